"""Inputs and cases of the short causal convolution."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import hope_ext
from hope_ext.testing.case import Case


def conv_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    batch: int = 2,
    tokens: int = 37,
    channels: int = 24,
    width: int = 4,
    activation: str = "silu",
    bounds: list[int] | None = None,
    tail: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Normal inputs and weights of scale K^(-1/2); drawn in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, to: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        draw = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (scale * draw).to(device, to)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arguments: dict[str, Any] = {
        "x": normal(batch, tokens, channels),
        "weight": normal(channels, width, to=wide, scale=width**-0.5),
        "activation": activation,
    }
    sequences = batch
    if bounds is not None:
        arguments["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
        sequences = len(bounds) - 1
    if tail:
        arguments["tail"] = normal(sequences, width - 1, channels)
    return arguments


def _conv(name: str, *, tiny: bool = False, **options: Any) -> Case:
    make = functools.partial(conv_inputs, **options)
    return Case("conv", name, hope_ext.causal_conv, make, tiny, everything="return_tail")


_CONV_TINY: dict[str, Any] = {"batch": 2, "tokens": 5, "channels": 3, "width": 3}

CASES: tuple[Case, ...] = (
    _conv("silu"),
    _conv("linear", activation="none"),
    _conv("tail", tail=True),
    _conv("blocks", tokens=130, channels=130, tail=True),
    _conv("one-token", tokens=1, tail=True),
    _conv("no-token", tokens=0, tail=True),
    _conv("no-batch", batch=0),
    _conv("width-1", width=1, tail=True),
    _conv("width-64", width=64, tokens=70, tail=True),
    _conv("packed", batch=1, tokens=140, bounds=[0, 2, 2, 67, 68, 140], tail=True),
    _conv("packed-nothing", batch=1, tokens=0, bounds=[0]),
    _conv("tiny", tiny=True, **_CONV_TINY),
    _conv("tail-tiny", tiny=True, tail=True, **_CONV_TINY),
    _conv("linear-tiny", tiny=True, activation="none", tail=True, **_CONV_TINY),
    _conv(
        "packed-tiny",
        tiny=True,
        **{**_CONV_TINY, "batch": 1},
        bounds=[0, 1, 5],
        tail=True,
    ),
)
