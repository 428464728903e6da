"""What the optimizers share: the step around their rules, checks, states wider than parameters."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import hope_ext

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
Group = dict[str, Any]


def wide(dtype: torch.dtype) -> torch.dtype:
    """What states are kept and steps are computed in: float32, or float64."""
    return torch.promote_types(dtype, torch.float32)


def zeros(parameter: Tensor) -> Tensor:
    """A state of a parameter."""
    return torch.zeros_like(parameter, dtype=wide(parameter.dtype))


def local(x: Tensor) -> Tensor:
    """This process's part of a tensor that is cut over ranks (a DTensor); of others, all."""
    return x.to_local() if _is_cut(x) else x


def by_mesh(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """The parameters that are cut over the same ranks together: one operation may take these."""
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        groups[parameter.device_mesh if _is_cut(parameter) else None].append(parameter)
    return list(groups.values())


def _is_cut(x: Tensor) -> bool:
    return hasattr(x, "device_mesh")  # the class is slow to import


def as_matrix(x: Tensor) -> Tensor:
    """[m, n]: the first dimension by the rest; a vector or a number is one row."""
    return x.reshape(1, -1) if x.dim() < 2 else x.reshape(x.shape[0], -1)


def orthogonalised(matrices: Sequence[Tensor]) -> list[Tensor]:
    """`hope_ext.newton_schulz` of each, those of a shape in one call."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for i, x in enumerate(matrices):
        alike[x.shape, x.dtype, x.device].append(i)
    results: dict[int, Tensor] = {}
    for indices in alike.values():
        stack = torch.stack([matrices[i] for i in indices])
        results |= zip(indices, hope_ext.newton_schulz(stack), strict=True)
    return [results[i] for i in range(len(matrices))]


class Optimizer(torch.optim.Optimizer):
    """A torch.optim.Optimizer whose subclass has a rule for the parameters of a group.

    Parameters are float32, bfloat16 or float64, gradients dense. States are float32 (float64 of
    float64 parameters), also after `load_state_dict`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        closure: computes the loss anew, with gradients; what it gives is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_groups(
            [(group, list(_with_gradients(group["params"]))) for group in self.param_groups]
        )
        return loss

    def _step_groups(self, groups: Sequence[tuple[Group, list[Tensor]]]) -> None:
        for group, params in groups:
            if params:
                self._update(group, params)

    def _update(self, group: Group, params: list[Tensor]) -> None:
        """The step of a group's parameters that have gradients."""
        raise NotImplementedError

    def _check(self, group: Group) -> None:
        """Raises a ValueError or TypeError that names a setting of the group that is wrong."""
        raise NotImplementedError

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for parameter in group["params"]:
                if parameter.dtype not in DTYPES:
                    got = str(parameter.dtype).removeprefix("torch.")
                    raise TypeError(f"params: expected float32, bfloat16 or float64, got {got}")
            self._check(group)
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch casts states to their parameter's dtype. Ours are wider, and stay what they were.
        saved = _members(state_dict["param_groups"])
        for index, parameter in zip(saved, _members(self.param_groups), strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if not isinstance(value, Tensor):
                    continue
                if self.state[parameter][key].dtype != value.dtype:
                    self.state[parameter][key] = value.to(parameter.device, copy=True)


def _members(groups: Sequence[Group]) -> Iterator[Any]:
    return itertools.chain.from_iterable(group["params"] for group in groups)


def _with_gradients(params: Sequence[Tensor]) -> Iterator[Tensor]:
    for parameter in params:
        if parameter.grad is not None:
            if parameter.grad.layout != torch.strided:
                raise ValueError(
                    f"params: expected dense gradients, got one with layout {parameter.grad.layout}"
                )
            yield parameter


# ---- checks --------------------------------------------------------------------------------------


def check_number(
    group: Group, name: str, low: float = 0.0, high: float = math.inf, *, closed: bool = False
) -> None:
    """A number in [low, high), or with `closed` in [low, high]."""
    value = group[name]
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not (low <= value < high or (closed and value == high)):
        bracket = "]" if closed else ")"
        raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}{bracket}, got {value}")


def check_count(group: Group, name: str) -> None:
    value = group[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a positive integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value}")


def check_choice(group: Group, name: str, options: Sequence[object]) -> None:
    if group[name] not in options:
        names = ", ".join(map(repr, options))
        raise ValueError(f"{name}: expected one of {names}, got {group[name]!r}")
