"""Floating-point operations of the operators, of their sizes alone.

What every implementation has to compute is counted: nothing that one computes again, no triangle
that one may skip, and nothing but products.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from hope_ext import _load

Shape = Sequence[int]


def titans_flops(
    tokens: int,
    heads: int,
    key: int,
    value: int,
    chunk_size: int,
    *,
    hidden: int | None = None,
    backward: bool = False,
) -> int:
    """The dual form with momentum, per the algebra in docs/derivations.md; with `backward` of both
    passes.

    A linear memory with key = value = D: 10 D^2 + 4 C D per token and head forward, 22 D^2 + 10 C D
    more with the backward. A deep one with `hidden` = F: 22 D F + 4 C (D + F), and 2.5 times that
    more.
    """
    scores = chunk_size * (key + value)
    if hidden is not None:
        forward = 11 * hidden * (key + value) + 2 * scores + 4 * chunk_size * hidden
        return tokens * heads * (7 * forward // 2 if backward else forward)
    state = key * value
    forward = 10 * state + 2 * scores
    return tokens * heads * (forward + (22 * state + 5 * scores if backward else 0))


def selfmod_flops(tokens: int, heads: int, dim: int, hidden: int, chunk_size: int) -> int:
    """The forward in chunks: 70 D F + 10 C F + 2 C D per token and head for deep memories; for
    linear ones (hidden 0), which a chunk moves by one common matrix, 8 D^2 + 6 D^3 / C + 4 C D. The
    backward has two products for each of them."""
    if hidden == 0:
        each = 8 * dim**2 + 6 * dim**3 // chunk_size + 4 * chunk_size * dim
    else:
        each = 70 * dim * hidden + 10 * chunk_size * hidden + 2 * chunk_size * dim
    return tokens * heads * each


def cms_flops(tokens: int, dim: int, hidden: int, *, learned: int) -> dict[str, int]:
    """Forward, and in the backward.

    A token costs 4 D F to read and 8 D F in the backward; one of the `learned`, in chunks that the
    memory learns from, 6 D F and 12 D F more.
    """
    size = dim * hidden
    return {
        "forward": 4 * size * tokens + 6 * size * learned,
        "backward": 8 * size * tokens + 12 * size * learned,
    }


def conv_flops(tokens: int, channels: int, width: int, *, backward: bool = False) -> int:
    """A multiply-add per tap; with `backward` of both passes: the backward computes the sums under
    SiLU again, and has two products per tap of its own."""
    return (8 if backward else 2) * tokens * channels * width


def newton_schulz_flops(batch: int, rows: int, columns: int, steps: int) -> int:
    """Of all products, of the symmetric ones A and A^2 only half."""
    small, large = sorted((rows, columns))
    return batch * steps * (small * small * large + small**3 + 2 * small * small * large)


# ---- for torch's counter -------------------------------------------------------------------------


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """What `torch.utils.flop_counter.FlopCounterMode(custom_mapping=...)` needs to count the
    operators here, and torch's attention on a CPU, which it does not know.

    A formula sees shapes alone: packed documents, and a chunk that an earlier call has begun, are
    counted as one text that starts with a chunk. Attention is counted as torch counts it, without
    regard to causality. The optimizer's operator, which has no products, is not counted.
    """
    aten = torch.ops.aten
    formulas: dict[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    if _load.use_reference():  # the definitions consist of what torch's counter knows
        return formulas
    ours = _load.operators()
    return formulas | {
        ours.titans: _titans,
        ours.titans_backward: _titans_backward,
        ours.selfmod: _selfmod,
        ours.selfmod_backward: _selfmod_backward,
        ours.cms: _cms,
        ours.cms_backward: _cms_backward,
        ours.conv: _conv,
        ours.conv_backward: _conv_backward,
        ours.newton_schulz: _newton_schulz,
    }


def _titans_sizes(arguments: Sequence[Any]) -> tuple[tuple[int, ...], int | None]:
    """Of the arguments from q on: tokens, heads, key, value, chunk size; and hidden."""
    q, v, w1, w2, chunk_size = (arguments[i] for i in (0, 2, 6, 7, 16))
    return (q[0] * q[1], q[2], q[3], v[3], chunk_size), None if w2 is None else w1[3]


def _titans(*arguments: Any, **_: Any) -> int:
    sizes, hidden = _titans_sizes(arguments)
    return titans_flops(*sizes, hidden=hidden)


def _titans_backward(*arguments: Any, **_: Any) -> int:
    # After the gradients; the checkpoints are one tensor more.
    inputs = [*arguments[7:23], *arguments[24:]]
    sizes, hidden = _titans_sizes(inputs)
    both = titans_flops(*sizes, hidden=hidden, backward=True)
    return both - titans_flops(*sizes, hidden=hidden)


def _selfmod_sizes(x: Shape, weights: Sequence[Shape], chunk_size: int) -> tuple[int, ...]:
    """Tokens, heads, dim, hidden (0: linear), chunk size: deep memories have ten matrices."""
    hidden = weights[0][3] if len(weights) == 10 else 0
    return x[0] * x[1], x[2], x[3], hidden, chunk_size


def _selfmod(x: Shape, q: Shape, weights: Sequence[Shape], *rest: Any, **_: Any) -> int:
    return selfmod_flops(*_selfmod_sizes(x, weights, rest[5]))


def _selfmod_backward(*arguments: Any, **_: Any) -> int:
    x, weights, chunk_size = arguments[3], arguments[5], arguments[12]
    return 2 * selfmod_flops(*_selfmod_sizes(x, weights, chunk_size))


def _cms_of(x: Shape, w1: Shape, chunk_size: int, keeps_state: bool) -> dict[str, int]:
    """Whoever keeps no state learns nothing from the last chunk."""
    batch, tokens, dim = x
    learned = tokens if keeps_state else max(0, tokens - 1) // chunk_size * chunk_size
    return cms_flops(batch * tokens, dim, w1[2], learned=batch * learned)


def _cms(*arguments: Any, **_: Any) -> int:
    x, w1, chunk_size, keeps_state = (arguments[i] for i in (0, 3, 9, 14))
    return _cms_of(x, w1, chunk_size, keeps_state)["forward"]


def _cms_backward(*arguments: Any, **_: Any) -> int:
    x, w1, chunk_size = (arguments[i] for i in (5, 8, 15))
    keeps_state = any(gradient is not None for gradient in arguments[1:5])
    return _cms_of(x, w1, chunk_size, keeps_state)["backward"]


def _conv(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return conv_flops(x[0] * x[1], *weight)


def _conv_backward(d_y: Shape, d_tail: Shape, x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    sizes = (x[0] * x[1], *weight)
    return conv_flops(*sizes, backward=True) - conv_flops(*sizes)


def _newton_schulz(g: Shape, steps: int, *_: Any, **__: Any) -> int:
    *batch, rows, columns = g
    return newton_schulz_flops(math.prod(batch), rows, columns, steps)


def _attention(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(d_o: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(d_o, q, k, v)
