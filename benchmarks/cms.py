"""One level of the continuum memory system: the operator against its definition and against plain
PyTorch.

The plain PyTorch is what one writes first: a loop over the chunks with bmm over the batch, the
inner gradients by hand. It computes the same and is differentiable, too.

B batch, T tokens, D features, F hidden size, C chunk size. On the CPU only: there are no CUDA
kernels yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree

import hope_ext
from benchmarks.subjects import FORWARD, TRAINING, Contest, Operator, Row, Setting, Subject, Work
from hope_ext import testing


def run(**arguments: Any) -> Any:
    return hope_ext.cms_memory(**arguments)


def inputs(setting: Setting, *, batch: int | None = None, tokens: int | None = None) -> dict:
    """Arguments of `hope_ext.cms_memory`."""
    shape = setting.shape
    return testing.cms_inputs(
        setting.dtype,
        setting.device,
        batch=batch or shape["B"],
        tokens=tokens or shape["T"],
        dim=shape["D"],
        hidden=shape["F"],
        chunk_size=shape["C"],
    )


def check_arguments(setting: Setting) -> dict[str, Any]:
    """The benchmark's sizes, with one batch row and four chunks and a half: more than lie between
    two checkpoints."""
    tokens = min(setting.shape["T"], 9 * setting.shape["C"] // 2)
    return {**inputs(setting, batch=1, tokens=tokens), "return_state": True}


def operator_work(setting: Setting) -> dict[str, Work]:
    """The products of both passes, whatever is computed again; nobody asks for the final state, so
    the last chunk is not learned."""
    shape = setting.shape
    batch, tokens, chunk_size = shape["B"], shape["T"], shape["C"]
    learned = (tokens - 1) // chunk_size * chunk_size
    flops = testing.cms_flops(batch * tokens, shape["D"], shape["F"], learned=batch * learned)
    return {FORWARD: Work(flops["forward"]), TRAINING: Work(flops["forward"] + flops["backward"])}


def subject(setting: Setting, function: Any) -> Subject:
    """A call with gradients of everything that it is given."""
    leaves: list[Tensor] = []

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    arguments = _pytree.tree_map(leaf, inputs(setting))
    tokens = setting.shape["B"] * setting.shape["T"]
    return Subject(lambda: function(**arguments), tuple(leaves), tokens, operator_work(setting))


def bare(setting: Setting) -> Subject:
    return subject(setting, run)


def bare_reference(setting: Setting) -> Subject:
    return subject(setting, testing.backend("reference")(run))


# ---- plain PyTorch -------------------------------------------------------------------------------


def slope(z: Tensor) -> Tensor:
    """The derivative of gelu's tanh approximation."""
    scale = 0.7978845608028654
    t = (scale * z * (1 + 0.044715 * z * z)).tanh()
    return (1 + t) / 2 + z / 2 * (1 - t * t) * scale * (1 + 0.134145 * z * z)


def plain(
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    lr: Tensor,
    target: Tensor,
    *,
    chunk_size: int,
    decay: float,
    **defaults: Any,
) -> Tensor:
    """gelu, l2, with the residual; whole sequences."""
    expected = {"activation": "gelu", "objective": "l2", "residual": True}
    if defaults != expected:
        raise ValueError(f"expected {expected}, got {defaults}")
    dtype, tokens = x.dtype, x.shape[1]
    x, target = x.to(lr.dtype), target.to(lr.dtype)
    w1, w2 = (w.expand(len(x), *w.shape) for w in weights)
    outputs = []
    for start in range(0, tokens, chunk_size):
        here = slice(start, start + chunk_size)
        keys = x[:, here]
        z = torch.bmm(keys, w1)
        h = F.gelu(z, approximate="tanh")
        outputs.append(keys + torch.bmm(h, w2))
        if start + chunk_size >= tokens:
            break
        errors = lr[:, here, None] * (outputs[-1] - target[:, here])
        first = torch.bmm(keys.mT, torch.bmm(errors, w2.mT) * slope(z))
        second = torch.bmm(h.mT, errors)
        w1, w2 = (1 - decay) * w1 - first, (1 - decay) * w2 - second
    return torch.cat(outputs, 1).to(dtype)


def bare_plain(setting: Setting) -> Subject:
    return subject(setting, plain)


BENCHMARK = Operator(
    stem="cms",
    letters="BTDFC",
    shapes={"cpu": ((2, 2048, 256, 1024, 256), (1, 4096, 512, 2048, 512))},
    contests={
        "cpu": (
            Contest(
                "operator",
                (
                    Row("reference", bare_reference),
                    Row("plain PyTorch", bare_plain),
                    Row("ours", bare),
                ),
                "plain PyTorch",
            ),
        ),
    },
    run=run,
    check_arguments=check_arguments,
    quick=lambda shape: {**shape, "B": 1, "T": min(shape["T"], 2 * shape["C"])},
    roofs={"cpu": ("flops",)},
)
