"""One level of the continuum memory system (Nested Learning, arXiv 2512.24695, eqs. 70-71): an MLP
whose weights are rewritten once per chunk of tokens.

Legend: B batch (or packed sequences N), T tokens, D features, F hidden dim, n tokens of a chunk.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Matrices = tuple[Tensor, Tensor]  # of the first layer [D, F] and of the second [F, D]


@dataclass(frozen=True)
class Rules:
    """What a level computes, and what it learns from."""

    activation: str  # "gelu" (its tanh approximation) or "silu"
    objective: str  # "l2", "dot" or "teach"
    residual: bool
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul

    def act(self, z: Tensor) -> Tensor:
        return F.silu(z) if self.activation == "silu" else F.gelu(z, approximate="tanh")

    def slope(self, z: Tensor) -> Tensor:
        """act'(z)."""
        if self.activation == "silu":
            s = z.sigmoid()
            return s * (1 + z * (1 - s))
        scale = (2 / math.pi) ** 0.5
        t = (scale * (z + 0.044715 * z**3)).tanh()
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * scale * (1 + 3 * 0.044715 * z * z)

    def error(self, y: Tensor, target: Tensor) -> Tensor:
        """The inner loss's gradient at y."""
        if self.objective == "l2":
            return y - target
        return -target if self.objective == "dot" else target

    def chunk(
        self, x: Tensor, target: Tensor, lr: Tensor, weights: Matrices
    ) -> tuple[Tensor, Matrices]:
        """y [n, D], and the gradients of the weights, summed over the tokens with their rates.

        x, target [n, D]; lr [n, 1].
        """
        w1, w2 = weights
        z = self.product(x, w1)
        h = self.act(z)
        y = self.product(h, w2)
        y = x + y if self.residual else y
        s = lr * self.error(y, target)
        g = self.product(s, w2.mT) * self.slope(z)
        return y, (self.product(x.mT, g), self.product(h.mT, s))


def cms(
    x: Tensor,  # [B, T, D]
    target: Tensor,  # [B, T, D]
    lr: Tensor,  # [B, T]
    w1: Tensor,  # [B, D, F]
    w2: Tensor,  # [B, F, D]
    p1: Tensor | None,  # like w1: the chunk's gradient so far; None: zeros
    p2: Tensor | None,  # like w2
    position: Tensor | None,  # [B]; None: zeros
    cu_seqlens: Tensor | None,  # [N + 1]; then B of x is 1 and the state's rows are the N sequences
    chunk_size: int,
    activation: str,
    objective: str,
    decay: float,
    residual: bool,
    product_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Chunk by chunk, with the weights of the chunk's start for all of its tokens:

    y_t = x_t + act(x_t W1) W2
    e_t = y_t - target_t (l2) | -target_t (dot) | target_t (teach)
    P <- P + sum over the tokens of lr_t dW_t, the gradient of a loss whose gradient at y_t is e_t
    and when the chunk is complete: W <- (1 - decay) W - P,  P <- 0

    With `product_dtype` the operands of every product are rounded to it: the accuracy that a kernel
    of 16-bit products can have, so the tests' yardstick.

    Returns y [B, T, D] and the final w1, w2, p1 and p2.
    """

    def product(a: Tensor, b: Tensor) -> Tensor:
        return _RoundedProduct.apply(a, b, product_dtype)

    rules = Rules(activation, objective, residual, product)
    rows, out_dtype = [y.to(w1.dtype) for y in (x, target, lr[..., None])], x.dtype
    offsets = [0] * len(w1) if position is None else position.tolist()
    if cu_seqlens is None:
        sequences = list(zip(*rows, strict=True))
    else:
        bounds = itertools.pairwise(cu_seqlens.tolist())
        sequences = [[y[0, begin:end] for y in rows] for begin, end in bounds]
    pending = [torch.zeros_like(w) if p is None else p for p, w in ((p1, w1), (p2, w2))]
    if not sequences:
        return torch.zeros_like(x), w1, w2, *pending
    outputs, states = [], []
    for *sequence, offset, w, p in zip(
        *zip(*sequences, strict=True),
        offsets,
        zip(w1, w2, strict=True),
        zip(*pending, strict=True),
        strict=True,
    ):
        y, *state = _sequence(rules, *sequence, w, p, offset, chunk_size, 1 - decay)
        outputs.append(y)
        states.append(state)
    out = torch.stack(outputs) if cu_seqlens is None else torch.cat(outputs)[None]
    return out.to(out_dtype), *(torch.stack(matrices) for matrices in zip(*states, strict=True))


def _sequence(
    rules: Rules,
    x: Tensor,  # [T, D]
    target: Tensor,  # [T, D]
    lr: Tensor,  # [T, 1]
    weights: Matrices,
    pending: Matrices,
    offset: int,  # tokens seen
    chunk_size: int,
    keep: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [T, D] and the final weights and pending gradients of one sequence."""
    outputs, start = [x[:0]], 0
    while start < len(x):
        stop = min(len(x), start + chunk_size - (offset + start) % chunk_size)
        here = slice(start, stop)
        y, gradients = rules.chunk(x[here], target[here], lr[here], weights)
        outputs.append(y)
        pending = tuple(p + gradient for p, gradient in zip(pending, gradients, strict=True))
        if (offset + stop) % chunk_size == 0:
            weights = tuple(keep * w - p for w, p in zip(weights, pending, strict=True))
            pending = tuple(torch.zeros_like(p) for p in pending)
        start = stop
    return torch.cat(outputs), *weights, *pending


class _RoundedProduct(torch.autograd.Function):
    """a @ b with the operands rounded to `dtype`, in the backward's products as well."""

    @staticmethod
    def forward(ctx, a, b, dtype):
        ctx.save_for_backward(a, b)
        ctx.dtype = dtype
        return _RoundedProduct.product(a, b, dtype)

    @staticmethod
    def product(a, b, dtype):
        return a @ b if dtype is None else a.to(dtype).to(a.dtype) @ b.to(dtype).to(b.dtype)

    @staticmethod
    def backward(ctx, gradient):
        a, b = ctx.saved_tensors
        product = _RoundedProduct.product
        return product(gradient, b.mT, ctx.dtype), product(a.mT, gradient, ctx.dtype), None
