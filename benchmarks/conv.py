"""The short causal convolution with SiLU, against torch's own depthwise one and causal-conv1d.

It is bound by memory: a handful of operations on every number that is read. B batch, T tokens,
C channels, K width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import hope_ext
from benchmarks import peers
from benchmarks.subjects import (
    FORWARD,
    TRAINING,
    Contest,
    Operator,
    Row,
    Setting,
    Subject,
    Work,
    moved,
)
from hope_ext import testing


def run(**arguments: Any) -> Any:
    return hope_ext.causal_conv(**arguments)


@functools.lru_cache(maxsize=2)  # a GPU's shapes take seconds to draw
def _drawn(sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    batch, tokens, channels, width = sizes
    return testing.conv_inputs(
        dtype, device, batch=batch, tokens=tokens, channels=channels, width=width
    )


def check_arguments(setting: Setting) -> dict[str, Any]:
    """The benchmark's channels and width, with few tokens and two batch rows."""
    shape = setting.shape
    sizes = (min(shape["B"], 2), min(shape["T"], 150), shape["C"], shape["K"])
    return {**_drawn(sizes, setting.dtype, setting.device), "return_tail": True}


def work(setting: Setting) -> dict[str, Work]:
    """SiLU itself is not counted."""
    shape = setting.shape
    sizes = (shape["B"] * shape["T"], shape["C"], shape["K"])
    x = torch.empty(shape["B"], shape["T"], shape["C"], dtype=setting.dtype, device="meta")
    weight = torch.empty(shape["C"], shape["K"], device="meta")
    bytes_of = moved((x, weight), (x,))
    return {
        FORWARD: Work(testing.conv_flops(*sizes), bytes_of[FORWARD]),
        TRAINING: Work(testing.conv_flops(*sizes, backward=True), bytes_of[TRAINING]),
    }


def _subject(setting: Setting, function: Callable[[Tensor, Tensor], Tensor]) -> Subject:
    arguments = _drawn(tuple(setting.shape.values()), setting.dtype, setting.device)
    x, weight = (arguments[name].detach().requires_grad_() for name in ("x", "weight"))
    tokens = setting.shape["B"] * setting.shape["T"]
    return Subject(lambda: function(x, weight), (x, weight), tokens, work(setting))


def ours(setting: Setting) -> Subject:
    return _subject(setting, lambda x, weight: run(x=x, weight=weight, activation="silu"))


def reference(setting: Setting) -> Subject:
    subject = ours(setting)
    definition = testing.backend("reference")(subject.forward)
    return Subject(definition, subject.leaves, subject.tokens, subject.work)


def torch_conv1d(setting: Setting) -> Subject:
    """torch.nn.functional.conv1d with a group per channel, in x's dtype."""

    def function(x: Tensor, weight: Tensor) -> Tensor:
        channels, width = weight.shape
        taps = weight.to(x.dtype).unsqueeze(1)
        z = F.conv1d(x.mT, taps, padding=width - 1, groups=channels)[..., : x.shape[1]]
        return F.silu(z).mT

    return _subject(setting, function)


def causal_conv1d(setting: Setting) -> Subject:
    function = peers.causal_conv1d()
    return _subject(setting, lambda x, weight: function(x.mT, weight, activation="silu").mT)


_REFERENCE, _OURS = Row("reference", reference), Row("ours", ours)
_TORCH = Row("torch conv1d", torch_conv1d)
_PEER = Row("causal-conv1d", causal_conv1d, peer="causal-conv1d")

BENCHMARK = Operator(
    stem="conv",
    letters="BTCK",
    shapes={  # q, k and v together, of the Titans memory's shapes
        "cpu": ((2, 1024, 768, 4),),
        "cuda": ((8, 4096, 3072, 4), (4, 8192, 3072, 4)),
    },
    contests={
        "cpu": (Contest("operator", (_REFERENCE, _TORCH, _OURS), "torch conv1d"),),
        "cuda": (Contest("operator", (_REFERENCE, _TORCH, _PEER, _OURS), "torch conv1d"),),
    },
    run=run,
    check_arguments=check_arguments,
    quick=lambda shape: {**shape, "B": 1, "T": min(shape["T"], 128)},
    roofs={"cpu": ("bytes",), "cuda": ("bytes",)},
)
