"""Momentum as a memory that may be deep."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.optimizer import ParamsT

import hope_ext
from hope.optim.base import (
    Group,
    Optimizer,
    as_matrix,
    check_choice,
    check_count,
    check_number,
    orthogonalised,
    wide,
)
from hope.optim.momentum import Preconditioner, check_preconditioner, momenta_of, preconditioned


class DMGD(Optimizer):
    """Deep momentum gradient descent: the momentum is what a memory answers to the gradient.

    Nested Learning (arXiv 2512.24695), equations 23-24, with the gradient g as a matrix [m, n]
    (first dimension by the rest; vectors are [1, n]):

        W <- W + lr sigma(output)

        memory "matrix":  M <- alpha M - eta P(g),   output = M
        memory "mlp":     M(x) = gelu(x W1) W2;   keys are the rows of g, each of length 1, values
                          the rows of -P(g)
                          (W1, W2) <- alpha (W1, W2) - eta d/d(W1, W2) mean over rows of
                                      1/2 |M(key) - value|^2
                          output = M(keys) with the new weights, each row times the length of its
                          row of g

    sigma None is the identity, with which a matrix is the heavy ball: lr = 1, eta the rate. sigma
    "newton_schulz" makes the output nearly orthogonal (`hope_ext.newton_schulz`), with which a
    matrix is torch.optim.Muon without Nesterov momentum, weight decay and factors of its rate.

    The deep memory's step is `hope_ext.titans_memory` with the rows as one chunk. It has no
    residual: with one, what is not learned yet would be a step along the gradient, uphill. On a GPU
    n and `hidden` have to be sizes that its kernels know.

    Args:
        params: parameters or groups of them.
        lr: the outer rate, 0 or more.
        eta: the inner rate, 0 or more; None: 1 for a matrix, 1 / hidden for a deep memory, whose
            steps are stable for some 4 / hidden as long as values have a length near 1.
        alpha: in [0, 1]; what the memory keeps in a step. All of a deep memory's weights decay: it
            wants more than a matrix, 0.99 say.
        sigma: None or "newton_schulz".
        memory: "matrix" or "mlp".
        hidden: F of the deep memory, W1 [n, F] and W2 [F, n], for every parameter. W1 starts
            standard normal (keys have length 1), W2 at zero.
        preconditioner, beta2, eps: P, as in `PreconditionedMomentum`; None: P(g) = g. Rows of
            length 1, torch.nn.functional.normalize, suit a deep memory: what it has learned is then
            the gradient, and what it has to learn has one size.
        seed: of W1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        eta: float | None = None,
        alpha: float = 0.9,
        sigma: str | None = None,
        memory: str = "matrix",
        hidden: int = 64,
        preconditioner: Preconditioner = None,
        beta2: float = 0.999,
        eps: float = 1e-8,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "eta": eta, "alpha": alpha, "sigma": sigma, "memory": memory}
        defaults |= {"hidden": hidden, "preconditioner": preconditioner, "seed": seed}
        super().__init__(params, {**defaults, "beta2": beta2, "eps": eps})

    def _check(self, group: Group) -> None:
        check_number(group, "lr")
        if group["eta"] is not None:
            check_number(group, "eta")
        check_number(group, "alpha", 0, 1, closed=True)
        check_choice(group, "sigma", (None, "newton_schulz"))
        check_choice(group, "memory", ("matrix", "mlp"))
        check_count(group, "hidden")
        check_preconditioner(group)

    def _update(self, group: Group, params: list[Tensor]) -> None:
        directions = preconditioned(self, group, params)
        if group["memory"] == "matrix":
            outputs = momenta_of(self, params)
            torch._foreach_mul_(outputs, group["alpha"])
            torch._foreach_add_(outputs, directions, alpha=-_inner_rate(group))
        else:
            outputs = [
                self._recall(group, parameter, direction)
                for parameter, direction in zip(params, directions, strict=True)
            ]
        if group["sigma"] is not None:
            matrices = orthogonalised(list(map(as_matrix, outputs)))
            outputs = [x.reshape(p.shape) for x, p in zip(matrices, params, strict=True)]
        torch._foreach_add_(params, outputs, alpha=float(group["lr"]))

    def _recall(self, group: Group, parameter: Tensor, direction: Tensor) -> Tensor:
        """The deep memory's step with this gradient, and its answer afterwards."""
        g = as_matrix(parameter.grad.to(wide(parameter.dtype)))
        values = -as_matrix(direction)
        lengths = torch.linalg.vector_norm(g, dim=1, keepdim=True)
        keys = g / lengths.clamp(min=torch.finfo(g.dtype).tiny)
        w1, w2 = self._weights(group, parameter, keys)
        rows = keys.shape[0]
        rate = keys.new_full((1, rows, 1), _inner_rate(group) / rows)
        decay = torch.zeros_like(rate)
        decay[:, 0] = 1 - group["alpha"]
        _, state = hope_ext.titans_memory(
            *(x[None, :, None].contiguous() for x in (keys, keys, values)),
            rate,
            (w1[None], w2[None]),
            decay=decay,
            chunk_size=rows,
            residual=False,
            read="chunk",
            return_state=True,
        )
        for old, new in zip((w1, w2), state.weights, strict=True):
            old.copy_(new[0, 0])
        answers = F.gelu(keys @ w1, approximate="tanh") @ w2
        return (lengths * answers).reshape(parameter.shape)

    def _weights(self, group: Group, parameter: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state[parameter]
        if "w1" not in state:
            columns, hidden = keys.shape[1], group["hidden"]
            draw = torch.Generator().manual_seed(group["seed"])
            state["w1"] = torch.randn(columns, hidden, generator=draw, dtype=keys.dtype).to(keys)
            state["w2"] = keys.new_zeros(hidden, columns)
        return state["w1"], state["w2"]


def _inner_rate(group: Group) -> float:
    if group["eta"] is not None:
        return float(group["eta"])
    return 1.0 if group["memory"] == "matrix" else 1 / group["hidden"]
