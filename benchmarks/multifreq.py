"""The multi-frequency step against torch.optim's fused AdamW and SGD.

It is bound by memory. N tensors of P elements each; tokens are parameters here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import hope_ext
from benchmarks.subjects import FORWARD, Contest, Operator, Row, Setting, Subject, Work
from hope_ext import testing
from hope_ext.testing.multifreq import stepped

PERIODS = (1, 4, 16, 64)  # of one parameter after the other, where they differ
OPTIONS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def run(**arguments: Any) -> Any:
    """What one step makes of copies of its arguments."""
    return stepped(**arguments)


def check_arguments(setting: Setting) -> dict[str, Any]:
    """Few elements; every kind of ending, and gradients in the parameters' dtype."""
    size = min(setting.shape["P"], 50000)
    return testing.multifreq_inputs(
        setting.dtype,
        setting.device,
        shapes=[(size,), (7, 3), (33,)],
        periods=[1, 4, 3],
        nothing_pending=True,
    )


def _bytes(period: int, element: int, rule: str) -> float:
    """Per element, on average over the steps of a period: the gradient and the parameter are read,
    the parameter is written when it is due; moments and what is pending are read and written."""
    moments, pending = 16 * (rule == "adamw"), 8 * (period > 1)
    return 2 * element + element / period + moments + pending


def work(setting: Setting, rule: str, periods: Sequence[int]) -> dict[str, Work]:
    count, size = setting.shape["N"], setting.shape["P"]
    taken = [periods[i % len(periods)] for i in range(count)]
    each = sum(_bytes(period, setting.dtype.itemsize, rule) for period in taken)
    return {FORWARD: Work(0, round(size * each))}


def _drawn(setting: Setting) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and gradients."""
    count, size = setting.shape["N"], setting.shape["P"]
    draw = torch.Generator(setting.device).manual_seed(0)
    options = {"generator": draw, "device": setting.device}
    return tuple(
        [torch.randn(size, **options).to(setting.dtype) for _ in range(count)] for _ in range(2)
    )


def _subject(
    setting: Setting, step: Callable[[], Tensor], rule: str, periods: Sequence[int] = (1,)
) -> Subject:
    parameters = setting.shape["N"] * setting.shape["P"]
    return Subject(step, (), parameters, work(setting, rule, periods))


def _ours(setting: Setting, rule: str, periods: Sequence[int] = (1,)) -> Subject:
    params, grads = _drawn(setting)
    taken = [periods[i % len(periods)] for i in range(len(params))]

    def states() -> list[Tensor]:
        return [torch.zeros_like(p, dtype=torch.float32) for p in params]

    pending = [x if period > 1 else x[:0] for x, period in zip(states(), taken, strict=True)]
    moments = (states(), states()) if rule == "adamw" else ([], [])
    steps = 0

    def step() -> Tensor:
        nonlocal steps
        steps += 1
        hope_ext.multi_frequency_step_(
            params, grads, pending, *moments, taken, steps, rule=rule, **OPTIONS
        )
        return params[0]

    return _subject(setting, step, rule, periods)


def _torchs(setting: Setting, rule: str, **how: bool) -> Subject:
    params, grads = _drawn(setting)
    params = list(map(nn.Parameter, params))
    for parameter, gradient in zip(params, grads, strict=True):
        parameter.grad = gradient
    options = {"lr": OPTIONS["lr"], "weight_decay": OPTIONS["weight_decay"], **how}
    if rule == "adamw":
        betas = (OPTIONS["beta1"], OPTIONS["beta2"])
        optimizer = torch.optim.AdamW(params, betas=betas, eps=OPTIONS["eps"], **options)
    else:
        optimizer = torch.optim.SGD(params, **options)

    def step() -> Tensor:
        optimizer.step()
        return params[0]

    return _subject(setting, step, rule)


def ours_adamw(setting: Setting) -> Subject:
    return _ours(setting, "adamw")


def ours_periods(setting: Setting) -> Subject:
    return _ours(setting, "adamw", PERIODS)


def ours_sgd(setting: Setting) -> Subject:
    return _ours(setting, "sgd")


def reference(setting: Setting) -> Subject:
    subject = ours_adamw(setting)
    definition = testing.backend("reference")(subject.forward)
    return Subject(definition, subject.leaves, subject.tokens, subject.work)


def torch_adamw(setting: Setting) -> Subject:
    return _torchs(setting, "adamw", fused=True)


def torch_adamw_foreach(setting: Setting) -> Subject:
    return _torchs(setting, "adamw", foreach=True)


def torch_sgd(setting: Setting) -> Subject:
    return _torchs(setting, "sgd", fused=True)


ADAMW = Contest(
    "adamw",
    (
        Row("reference", reference),
        Row("torch AdamW, foreach", torch_adamw_foreach),
        Row("torch AdamW, fused", torch_adamw),
        Row("ours", ours_adamw),
        Row(f"ours, periods {', '.join(map(str, PERIODS))}", ours_periods),
    ),
    "torch AdamW, fused",
)
SGD = Contest(
    "sgd", (Row("torch SGD, fused", torch_sgd), Row("ours", ours_sgd)), "torch SGD, fused"
)

BENCHMARK = Operator(
    stem="multifreq",
    letters="NP",
    shapes={"cpu": ((24, 2**22),), "cuda": ((24, 2**24),)},  # 100 and 400 million
    contests={"cpu": (ADAMW, SGD), "cuda": (ADAMW, SGD)},
    run=run,
    check_arguments=check_arguments,
    quick=lambda shape: {"N": min(shape["N"], 3), "P": min(shape["P"], 1000)},
    roofs={"cpu": ("bytes",), "cuda": ("bytes",)},
    passes=(FORWARD,),
)
