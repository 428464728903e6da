"""Inputs, costs and cases of the continuum memory system."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import hope_ext
from hope_ext.cms import CUDA_SIZES
from hope_ext.testing.case import Case


def cms_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    batch: int = 2,
    tokens: int = 37,
    dim: int = 16,
    hidden: int = 32,
    chunk_size: int = 16,
    rate: float = 0.5,
    activation: str = "gelu",
    objective: str = "l2",
    decay: float = 0.1,
    residual: bool = True,
    bounds: list[int] | None = None,
    positions: list[int] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Normal tokens and targets, and rates in the inner loop's stable range; drawn in float64."""
    draw = _Draw(dtype, device, seed)
    arguments: dict[str, Any] = {
        "x": draw.normal(batch, tokens, dim),
        "weights": draw.memory(dim, hidden),
        "lr": draw.rates(rate, batch, tokens, dim, chunk_size),
        "target": draw.normal(batch, tokens, dim),
        "chunk_size": chunk_size,
        "activation": activation,
        "objective": objective,
        "decay": decay,
        "residual": residual,
    }
    sequences = batch
    if bounds is not None:
        arguments["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
        sequences = len(bounds) - 1
    if positions is not None:
        arguments["state"] = draw.state(sequences, dim, hidden, chunk_size, positions)
    return arguments


def cms_chain_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    batch: int = 2,
    tokens: int = 37,
    dim: int = 16,
    hidden: Sequence[int] = (32, 48),
    chunk_sizes: Sequence[int] = (8, 16),
    positions: list[int] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The same for `hope_ext.cms_chain`: as many levels as there are chunk sizes."""
    draw = _Draw(dtype, device, seed)
    arguments: dict[str, Any] = {
        "x": draw.normal(batch, tokens, dim),
        "levels": [draw.memory(dim, size) for size in hidden],
        "lrs": [draw.rates(0.3, batch, tokens, dim, size) for size in chunk_sizes],
        "targets": [draw.normal(batch, tokens, dim) for _ in chunk_sizes],
        "chunk_sizes": list(chunk_sizes),
        "decay": 0.1,
    }
    if positions is not None:
        arguments["states"] = [
            draw.state(batch, dim, *sizes, positions)
            for sizes in zip(hidden, chunk_sizes, strict=True)
        ]
    return arguments


class _Draw:
    """Random tensors in a case's dtype and on its device."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(self, *shape: int, to: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        draw = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return (scale * draw).to(self.device, to or self.dtype)

    def memory(self, dim: int, hidden: int, *leading: int, scale: float = 1.0) -> tuple:
        return tuple(
            self.normal(*leading, *size, to=self.wide, scale=scale * max(size[0], 1) ** -0.5)
            for size in ((dim, hidden), (hidden, dim))
        )

    def rates(self, rate: float, batch: int, tokens: int, dim: int, chunk_size: int) -> Tensor:
        """A token's own step is rate / sqrt(chunk_size) of a whole one at most."""
        high = rate / (max(dim, 1) * chunk_size**0.5)
        draw = torch.rand((batch, tokens), generator=self.generator, dtype=torch.float64)
        return (high * draw).to(self.device, self.wide)

    def state(
        self, sequences: int, dim: int, hidden: int, chunk_size: int, positions: list[int]
    ) -> hope_ext.CmsState:
        return hope_ext.CmsState(
            weights=self.memory(dim, hidden, sequences),
            pending=self.memory(dim, hidden, sequences, scale=0.2),
            position=torch.tensor(positions, device=self.device),
            chunk_size=chunk_size,
        )


def _on_cuda(*sizes: int) -> bool:
    return all(size % CUDA_SIZES == 0 for size in sizes)


def _cms(name: str, *, tiny: bool = False, **options: Any) -> Case:
    cuda = _on_cuda(options.get("dim", 16), options.get("hidden", 32))
    make = functools.partial(cms_inputs, **options)
    return Case("cms", name, hope_ext.cms_memory, make, tiny, cuda=cuda)


def _chain(name: str, *, tiny: bool = False, **options: Any) -> Case:
    cuda = _on_cuda(options.get("dim", 16), *options.get("hidden", (32, 48)))
    make = functools.partial(cms_chain_inputs, **options)
    return Case("cms", name, hope_ext.cms_chain, make, tiny, cuda=cuda)


_TINY: dict[str, Any] = {"batch": 1, "tokens": 5, "dim": 3, "hidden": 4, "chunk_size": 2}

CASES: tuple[Case, ...] = (
    *(
        case
        for objective in ("l2", "dot", "teach")
        for activation in ("gelu", "silu")
        for case in (
            _cms(f"{objective}-{activation}", objective=objective, activation=activation),
            _cms(
                f"{objective}-{activation}-tiny", tiny=True, **_TINY,
                objective=objective, activation=activation, residual=activation == "gelu",
            ),
        )
    ),
    _cms("alone", residual=False),
    _cms("alone-dot", residual=False, objective="dot"),
    _cms("no-decay", decay=0.0),
    _cms("all-decays", decay=1.0),
    _cms("one-token", tokens=1),
    _cms("no-token", tokens=0),
    _cms("no-batch", batch=0),
    _cms("no-batch-no-token", batch=0, tokens=0),
    _cms("whole-chunks", tokens=32),
    _cms("one-past-a-chunk", tokens=33),
    _cms("one-chunk", tokens=16),
    _cms("within-a-chunk", tokens=11),
    _cms("chunk-of-1", tokens=9, chunk_size=1),
    _cms("chunk-of-150", tokens=333, chunk_size=150),
    # Weights are kept at every fifth chunk: the backward has several groups to go over.
    _cms("groups", tokens=77, chunk_size=3),
    _cms("groups-teach", tokens=77, chunk_size=3, objective="teach"),
    _cms("odd-sizes", batch=3, dim=5, hidden=7),
    _cms("one-wide", dim=1, hidden=1, rate=0.1),  # all tokens are alike
    _cms("narrow", dim=32, hidden=16),
    # More than one block of a product in rows, columns and depth; see csrc/common/product_cpu.h and
    # product.cuh.
    _cms("blocks", batch=1, tokens=290, chunk_size=140, dim=80, hidden=272),
    _cms("blocks-wide", batch=1, tokens=19, chunk_size=9, dim=272, hidden=144, objective="dot"),
    _cms("odd-blocks", batch=1, tokens=149, chunk_size=140, dim=72, hidden=270),
    _cms("many", batch=70, tokens=5, dim=4, hidden=3, chunk_size=2, rate=0.2),
    _cms("carried", positions=[5, 16]),
    _cms("carried-dot", positions=[15, 33], objective="dot"),
    _cms("carried-teach", positions=[3, 31], objective="teach", residual=False),
    _cms("carried-one-token", batch=4, positions=[15, 3, 0, 16], tokens=1),
    _cms("carried-no-token", positions=[16, 3], tokens=0),
    _cms("carried-in-a-long-chunk", tokens=150, chunk_size=128, positions=[70, 5]),
    _cms("carried-groups", tokens=50, chunk_size=3, positions=[2, 4]),
    _cms("carried-tiny", tiny=True, **_TINY, positions=[1]),
    _cms("packed", batch=1, tokens=50, bounds=[0, 7, 7, 39, 40, 50]),
    _cms("packed-carried", batch=1, tokens=50, bounds=[0, 7, 39, 50], positions=[3, 16, 31]),
    _cms("packed-groups", batch=1, tokens=90, chunk_size=4, bounds=[0, 3, 40, 41, 41, 90],
         positions=[3, 0, 3, 2, 5]),
    _cms("packed-tiny", tiny=True, **_TINY, bounds=[0, 1, 5], positions=[1, 0]),
    _cms("packed-nothing", batch=1, tokens=0, bounds=[0]),
    _chain("chain"),
    _chain("chain-of-3", hidden=(32, 16, 16), chunk_sizes=(4, 8, 8), positions=[5, 8]),
    _chain("chain-tiny", tiny=True, batch=1, tokens=5, dim=3, hidden=(4, 2), chunk_sizes=(1, 3),
           positions=[2]),
)  # fmt: skip
