"""Inputs, costs and cases of the Newton-Schulz iteration."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

import hope_ext
from hope_ext.testing.case import Case


def newton_schulz_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    batch: Sequence[int] = (2,),
    rows: int = 24,
    columns: int = 40,
    steps: int = 5,
    scale: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Normal matrices [*batch, rows, columns], drawn in float64."""
    generator = torch.Generator().manual_seed(seed)
    g = scale * torch.randn(*batch, rows, columns, generator=generator, dtype=torch.float64)
    return {"g": g.to(device, dtype), "steps": steps}


def _newton_schulz(name: str, *, tiny: bool = False, **options: Any) -> Case:
    return Case(
        "newton_schulz",
        name,
        hope_ext.newton_schulz,
        functools.partial(newton_schulz_inputs, **options),
        tiny,
        everything=None,
        differentiable=False,
        dtypes=(torch.float32, torch.bfloat16),
    )


CASES: tuple[Case, ...] = (
    _newton_schulz("wide"),
    _newton_schulz("tall", rows=40, columns=24),
    _newton_schulz("square", rows=33, columns=33),
    _newton_schulz("one-matrix", batch=(), rows=17, columns=64),
    _newton_schulz("two-batch-dimensions", batch=(3, 2), rows=8, columns=5),
    _newton_schulz("blocks", batch=(1,), rows=130, columns=270),
    _newton_schulz("tall-blocks", batch=(1,), rows=300, columns=131),
    _newton_schulz("shared", rows=140, columns=600, steps=2),  # too large for one thread
    _newton_schulz("shared-tall", rows=600, columns=140, steps=2),
    _newton_schulz("row", rows=1, columns=9),
    _newton_schulz("column", rows=9, columns=1),
    _newton_schulz("no-step", steps=0),
    _newton_schulz("small-numbers", scale=1e-6),
    _newton_schulz("no-matrix", batch=(0,)),
    _newton_schulz("no-row", rows=0),
    _newton_schulz("no-column", columns=0),
    _newton_schulz("tiny", tiny=True, rows=3, columns=4),
    _newton_schulz("tall-tiny", tiny=True, rows=5, columns=3, steps=2),
)
