"""Momentum on several time scales."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hope.optim.base import (
    Group,
    Optimizer,
    as_matrix,
    check_choice,
    check_count,
    check_number,
    orthogonalised,
    wide,
    zeros,
)


class M3(Optimizer):
    """Multi-scale momentum Muon: a fast and a slow momentum, both made orthogonal.

    Nested Learning (arXiv 2512.24695), Algorithm 1. In step i, with NS = `hope_ext.newton_schulz`
    of a gradient as a matrix (first dimension by the rest):

        form "printed":                       form "ema", its exponential averages, of which the
                                              bias-corrected ones are used
        M1 <- M1 + b1 g                       M1 <- b1 M1 + (1 - b1) g
        V  <- V + b2 g^2                      V  <- b2 V + (1 - b2) g^2
        every f steps, with s the sum of the last f gradients
        M2 <- M2 + b3 s,  O2 = NS(M2)         M2 <- b3 M2 + (1 - b3) s,  O2 = NS(M2)

        W <- W - lr (NS(M1) + a O2) / (sqrt(V) + eps)

    O2 is 0 before the first f steps are over. Vectors take the same rule without NS; with a = 0 and
    the form "ema" that is torch.optim.Adam.

    Args:
        params: parameters or groups of them.
        lr: 0 or more.
        b1, b2, b3: 0 or more; with the form "ema" in [0, 1).
        a: the weight of the slow momentum, 0 or more.
        f: steps between its updates.
        eps: 0 or more.
        form: "ema" or "printed".
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        b1: float = 0.9,
        b2: float = 0.999,
        b3: float = 0.9,
        a: float = 0.1,
        f: int = 10,
        eps: float = 1e-8,
        form: str = "ema",
    ) -> None:
        defaults = {"lr": lr, "b1": b1, "b2": b2, "b3": b3, "a": a, "f": f, "eps": eps}
        super().__init__(params, {**defaults, "form": form})

    def _check(self, group: Group) -> None:
        check_choice(group, "form", ("ema", "printed"))
        for name in ("b1", "b2", "b3"):
            check_number(group, name, 0, *([1] if group["form"] == "ema" else []))
        for name in ("lr", "a", "eps"):
            check_number(group, name)
        check_count(group, "f")

    def _update(self, group: Group, params: list[Tensor]) -> None:
        for parameter in params:
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                names = ("fast", "square", "slow", "sum", "slow_direction")  # M1, V, M2, s, O2
                state |= {name: zeros(parameter) for name in names}
            state["step"] += 1
        grads = [parameter.grad.to(wide(parameter.dtype)) for parameter in params]
        fast, squares, sums = (self._states(params, name) for name in ("fast", "square", "sum"))
        _average(fast, grads, group["b1"], group["form"])
        _average(squares, torch._foreach_mul(grads, grads), group["b2"], group["form"])
        torch._foreach_add_(sums, grads)
        due = [p for p in params if self.state[p]["step"] % group["f"] == 0]
        if due:
            self._update_slow(group, due)
        steps = [self.state[parameter]["step"] for parameter in params]
        ema = group["form"] == "ema"
        directions = _directions(_corrected(fast, group["b1"], steps) if ema else fast)
        torch._foreach_add_(
            directions, self._states(params, "slow_direction"), alpha=float(group["a"])
        )
        scales = torch._foreach_sqrt(_corrected(squares, group["b2"], steps) if ema else squares)
        torch._foreach_add_(scales, group["eps"])
        torch._foreach_addcdiv_(params, directions, scales, value=-float(group["lr"]))

    def _update_slow(self, group: Group, params: list[Tensor]) -> None:
        slow, sums = self._states(params, "slow"), self._states(params, "sum")
        _average(slow, sums, group["b3"], group["form"])
        torch._foreach_zero_(sums)
        updates = [self.state[parameter]["step"] // group["f"] for parameter in params]
        if group["form"] == "ema":
            slow = _corrected(slow, group["b3"], updates)
        for parameter, direction in zip(params, _directions(slow), strict=True):
            self.state[parameter]["slow_direction"] = direction

    def _states(self, params: list[Tensor], name: str) -> list[Tensor]:
        return [self.state[parameter][name] for parameter in params]


def _average(averages: list[Tensor], new: list[Tensor], b: float, form: str) -> None:
    if form == "ema":
        torch._foreach_lerp_(averages, new, 1 - b)
    else:
        torch._foreach_add_(averages, new, alpha=b)


def _corrected(averages: list[Tensor], b: float, updates: list[int]) -> list[Tensor]:
    """Without the bias towards the zeros that the averages began with."""
    return list(torch._foreach_mul(averages, [1 / (1 - b**count) for count in updates]))


def _directions(momenta: list[Tensor]) -> list[Tensor]:
    """NS of those that are matrices; new tensors."""
    matrices = iter(orthogonalised([as_matrix(x) for x in momenta if x.dim() >= 2]))
    return [next(matrices).reshape(x.shape) if x.dim() >= 2 else x.clone() for x in momenta]
