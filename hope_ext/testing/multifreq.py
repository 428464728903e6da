"""Inputs and cases of the multi-frequency step."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import hope_ext
from hope_ext.testing.case import Case


def multifreq_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    shapes: Sequence[tuple[int, ...]] = ((7, 5), (33,), (2, 3, 4)),
    periods: Sequence[int] = (1, 2, 4),
    step: int = 4,
    rule: str = "adamw",
    weight_decay: float = 0.1,
    grad_dtype: torch.dtype | None = None,
    nothing_pending: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Normal parameters and gradients, and a state in the middle of training; drawn in float64.

    grad_dtype: of the gradients, if it is not the parameters'; float64 is everything's.
    nothing_pending: periods of 1 have a pending tensor without elements.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(shape: tuple[int, ...], to: torch.dtype, scale: float = 1.0) -> Tensor:
        draw = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (scale * draw).to(device, to)

    adamw = rule == "adamw"
    if grad_dtype is None or wide == torch.float64:
        grad_dtype = dtype
    params = [normal(shape, dtype) for shape in shapes]
    grads = [normal(shape, grad_dtype, scale=0.1) for shape in shapes]
    pending = [normal(shape, wide, scale=0.01) for shape in shapes]
    for i, period in enumerate(periods):
        if nothing_pending and period == 1:
            pending[i] = pending[i].new_empty(0)
    return {
        "params": params,
        "grads": grads,
        "pending": pending,
        "exp_avgs": [normal(shape, wide, scale=0.1) for shape in shapes if adamw],
        "exp_avg_sqs": [normal(shape, wide, scale=0.1).square() for shape in shapes if adamw],
        "periods": list(periods),
        "step": step,
        "lr": 0.01,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "weight_decay": weight_decay,
        "rule": rule,
    }


def stepped(
    params: list[Tensor],
    grads: list[Tensor],
    pending: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    periods: list[int],
    step: int,
    **options: Any,
) -> tuple[list[Tensor], ...]:
    """What `multi_frequency_step_` makes of copies that lie in memory as the originals do."""
    lists = [list(map(_copy, tensors)) for tensors in (params, pending, exp_avgs, exp_avg_sqs)]
    hope_ext.multi_frequency_step_(lists[0], grads, *lists[1:], periods, step, **options)
    return tuple(lists)


def _copy(x: Tensor) -> Tensor:
    """Equal to x, with its strides and, but in traced code, which knows of none, its offset."""
    if torch.compiler.is_compiling():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
    memory = x.new_empty(x.untyped_storage().nbytes() // x.element_size())
    return memory.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)


def _multifreq(name: str, *, tiny: bool = False, **options: Any) -> Case:
    return Case(
        "multifreq",
        name,
        stepped,
        functools.partial(multifreq_inputs, **options),
        tiny,
        everything=None,
        differentiable=False,
        dtypes=(torch.float32, torch.bfloat16),
    )


_LARGE = {"shapes": ((70000,), (3, 5), (130, 257), (0, 4), (1,)), "periods": (3, 1, 2, 1, 5)}

CASES: tuple[Case, ...] = (
    _multifreq("adamw"),
    _multifreq("sgd", rule="sgd"),
    _multifreq("first-step", step=1),
    _multifreq("not-due", periods=(2, 3, 5), step=7),
    _multifreq("due", periods=(2, 3, 6), step=6),
    _multifreq("no-decay", weight_decay=0.0, step=2),
    _multifreq("sgd-no-decay", rule="sgd", weight_decay=0.0, step=2),
    _multifreq("nothing-pending", nothing_pending=True),
    _multifreq("sgd-nothing-pending", nothing_pending=True, rule="sgd", step=3),
    _multifreq("float32-gradients", grad_dtype=torch.float32),
    _multifreq("bfloat16-gradients", grad_dtype=torch.bfloat16),
    _multifreq("blocks", step=6, **_LARGE),
    _multifreq("sgd-blocks", step=6, rule="sgd", **_LARGE),
    _multifreq("scalar", shapes=((),), periods=(2,)),
    _multifreq("no-element", shapes=((0, 3),), periods=(1,)),
    _multifreq("no-parameter", shapes=(), periods=()),
    _multifreq("tiny", tiny=True),
    _multifreq("sgd-tiny", tiny=True, rule="sgd"),
)
