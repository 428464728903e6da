"""The Newton-Schulz iteration against its definition, which is torch's products one by one, and
torch.optim.Muon.

B matrices of M rows and N columns; tokens are their elements here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import hope_ext
from benchmarks.subjects import FORWARD, Contest, Operator, Row, Setting, Subject, Work
from hope_ext import testing

STEPS = 5


def run(**arguments: Any) -> Any:
    return hope_ext.newton_schulz(**arguments)


def _drawn(setting: Setting) -> Tensor:
    batch, rows, columns = setting.shape.values()
    sizes = {"batch": (batch,), "rows": rows, "columns": columns}
    return testing.newton_schulz_inputs(setting.dtype, setting.device, **sizes)["g"]


def check_arguments(setting: Setting) -> dict[str, Any]:
    return {"g": _drawn(setting)[:1], "steps": STEPS}


def _subject(setting: Setting, g: Tensor, function: Callable[[], Tensor]) -> Subject:
    flops = testing.newton_schulz_flops(*setting.shape.values(), STEPS)
    return Subject(function, (), g.numel(), {FORWARD: Work(flops, 2 * g.nbytes)})


def ours(setting: Setting) -> Subject:
    g = _drawn(setting)
    return _subject(setting, g, lambda: hope_ext.newton_schulz(g, steps=STEPS))


def reference(setting: Setting) -> Subject:
    subject = ours(setting)
    definition = testing.backend("reference")(subject.forward)
    return Subject(definition, subject.leaves, subject.tokens, subject.work)


def muon(setting: Setting) -> Subject:
    """A step of torch.optim.Muon with every matrix as a parameter; it computes in bfloat16."""
    g = _drawn(setting)
    params = [nn.Parameter(torch.zeros_like(matrix)) for matrix in g]
    for parameter, gradient in zip(params, g, strict=True):
        parameter.grad = gradient
    optimizer = torch.optim.Muon(params, ns_steps=STEPS)

    def step() -> Tensor:
        optimizer.step()
        return params[0]

    return _subject(setting, g, step)


_ROWS = (Row("reference", reference), Row("torch.optim.Muon", muon), Row("ours", ours))

BENCHMARK = Operator(
    stem="newton_schulz",
    letters="BMN",
    shapes={
        "cpu": ((1, 1024, 1024), (64, 64, 64)),
        "cuda": ((1, 1024, 1024), (16, 1024, 4096), (256, 64, 64)),
    },
    contests={device: (Contest("operator", _ROWS, "reference"),) for device in ("cpu", "cuda")},
    run=run,
    check_arguments=check_arguments,
    quick=lambda shape: {"B": min(shape["B"], 2), **{x: min(shape[x], 40) for x in "MN"}},
    passes=(FORWARD,),
)
