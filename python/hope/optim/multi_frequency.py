"""Every parameter group at its own frequency."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

import hope_ext
from hope.optim.base import (
    Group,
    Optimizer,
    check_choice,
    check_count,
    check_number,
    local,
    wide,
    zeros,
)

RULES = ("adamw", "sgd")


class MultiFrequency(Optimizer):
    """AdamW or SGD in which every group moves once in a `period`, by what it has accumulated.

    Equation 71 of Nested Learning (arXiv 2512.24695) for the outer loop. In a parameter's step i:

        adamw:  m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
                direction = (m / (1 - beta1^i)) / (sqrt(v / (1 - beta2^i)) + eps) + weight_decay W
        sgd:    direction = g + weight_decay W
        pending <- pending + lr direction
        where `period` divides i:   W <- W - pending,   pending <- 0

    All parameters of groups that differ in nothing but the period are one pass over memory
    (`hope_ext.multi_frequency_step_`). Periods of 1 are torch.optim.AdamW, or torch.optim.SGD
    without momentum. A gradient is this step's alone: call `zero_grad` in every step, not in every
    period.

    A scheduler may change the rate at any step: what is pending has been multiplied by the rate of
    its own step. `state_dict` holds what is pending, so that a run goes on in the middle of a
    period. A group whose period becomes 1 still subtracts what was pending.

    The rule is for each number alone: parameters may be DTensors, cut over the ranks of a run.

    Args:
        params: parameters, or groups of them, such as
            [{"params": fast}, {"params": slow, "period": 16}].
        lr, betas, eps, weight_decay: torch.optim.AdamW's; "sgd" uses the first and the last.
        period: of groups that do not say theirs, a positive integer.
        rule: "adamw" or "sgd".
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        period: int = 1,
        rule: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        defaults = {"lr": lr, "period": period, "rule": rule, "betas": betas}
        super().__init__(params, {**defaults, "eps": eps, "weight_decay": weight_decay})

    def _check(self, group: Group) -> None:
        check_number(group, "lr")
        check_count(group, "period")
        check_choice(group, "rule", RULES)
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"betas: expected two numbers, got {betas!r}")
        for i, beta in enumerate(betas):
            check_number({f"betas[{i}]": beta}, f"betas[{i}]", 0, 1)
        check_number(group, "eps")
        check_number(group, "weight_decay")

    def _step_groups(self, groups: Sequence[tuple[Group, list[Tensor]]]) -> None:
        together: dict[Any, list[tuple[Tensor, int]]] = defaultdict(list)
        for group, params in groups:
            beta1, beta2 = map(float, group["betas"])
            numbers = {name: float(group[name]) for name in ("lr", "eps", "weight_decay")}
            numbers |= {"beta1": beta1, "beta2": beta2}
            for parameter in params:
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                # One call has one step, one device, and float64 for all or none.
                kind = (state["step"], parameter.device, wide(parameter.dtype))
                key = (*kind, group["rule"], *numbers.items())
                together[key].append((parameter, group["period"]))
        for (step, _, _, rule, *numbers), members in together.items():
            self._step_together(members, step, rule, dict(numbers))

    def _step_together(
        self, members: list[tuple[Tensor, int]], step: int, rule: str, numbers: dict[str, float]
    ) -> None:
        params, periods = map(list, zip(*members, strict=True))
        states = [self.state[parameter] for parameter in params]
        for parameter, period, state in zip(params, periods, states, strict=True):
            if period > 1 and "pending" not in state:
                state["pending"] = zeros(parameter)
            if rule == "adamw" and "exp_avg" not in state:
                state["exp_avg"], state["exp_avg_sq"] = zeros(parameter), zeros(parameter)
        nothing = torch.empty(0, dtype=wide(params[0].dtype), device=params[0].device)
        pending = [state.get("pending", nothing) for state in states]
        moments = [
            [state[name] for state in states] if rule == "adamw" else []
            for name in ("exp_avg", "exp_avg_sq")
        ]
        grads = [parameter.grad for parameter in params]
        tensors = [[local(x) for x in xs] for xs in (params, grads, pending, *moments)]
        hope_ext.multi_frequency_step_(*tensors, periods, step, rule=rule, **numbers)
