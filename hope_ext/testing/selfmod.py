"""Inputs, costs and cases of HOPE's self-modifying memory."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import hope_ext
from hope_ext.reference.selfmod import NAMES
from hope_ext.testing.case import Case


def selfmod_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    batch: int = 2,
    tokens: int = 37,
    heads: int = 2,
    dim: int = 16,
    hidden: int | None = 32,
    chunk_size: int = 16,
    lr_max: float = 1.0,
    lr_bias: float = -2.0,
    retention_bias: float = 5.0,
    activation: str = "gelu",
    objective: str = "l2",
    read: str = "before",
    bounds: list[int] | None = None,
    positions: list[int] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Rows of length 1, memories and biases in the inner loop's stable range; drawn in float64.

    hidden: F of deep memories; None: linear ones.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    def rows() -> Tensor:
        return F.normalize(normal(batch, tokens, heads, dim), dim=-1).to(device, dtype)

    def memory(*leading: int, columns: int = dim) -> tuple[Tensor, ...]:
        sizes = [(dim, columns)] if hidden is None else [(dim, hidden), (hidden, columns)]
        # Rows of length 1 meet matrices that keep their length; a second layer is small beside the
        # input that is added to it.
        scales = [1.0] if hidden is None else [1.0, 0.3 if columns == dim else 2.0]
        return tuple(
            normal(*leading, *size, scale=scale * max(size[0], 1) ** -0.5).to(device, wide)
            for size, scale in zip(sizes, scales, strict=True)
        )

    def memories(*leading: int) -> hope_ext.SelfModifyingWeights:
        columns = {"lr": 1, "retention": 1}
        return hope_ext.SelfModifyingWeights(
            **{name: memory(*leading, columns=columns.get(name, dim)) for name in NAMES}
        )

    arguments: dict[str, Any] = {
        "x": rows(),
        "q": rows(),
        "memories": memories(heads),
        "lr_bias": (lr_bias + normal(heads, scale=0.5)).to(device, wide),
        "retention_bias": (retention_bias + normal(heads, scale=0.5)).to(device, wide),
        "chunk_size": chunk_size,
        "lr_max": lr_max,
        "activation": activation,
        "objective": objective,
        "read": read,
    }
    sequences = batch
    if bounds is not None:
        arguments["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
        sequences = len(bounds) - 1
    if positions is not None:
        arguments["state"] = hope_ext.SelfModifyingState(
            weights=memories(sequences, heads),
            anchor=memories(sequences, heads),
            position=torch.tensor(positions, device=device),
            chunk_size=chunk_size,
        )
    return arguments


CUDA_HEAD_SIZES = {16, 32, 64, 128}  # csrc/selfmod/selfmod_cuda.h


def _selfmod(name: str, *, tiny: bool = False, **options: Any) -> Case:
    make = functools.partial(selfmod_inputs, **options)
    cuda = options.get("dim", 16) in CUDA_HEAD_SIZES and (options.get("hidden") or 16) % 16 == 0
    return Case("selfmod", name, hope_ext.self_modifying_memory, make, tiny, cuda=cuda)


_TINY: dict[str, Any] = {
    "batch": 1, "tokens": 5, "heads": 2, "dim": 3, "hidden": 4, "chunk_size": 3,
    "lr_bias": -1.0, "retention_bias": 1.0,
}  # fmt: skip

CASES: tuple[Case, ...] = (
    *(
        case
        for kind, hidden in (("linear", None), ("deep", 32))
        for objective in ("l2", "dot")
        for read in ("after", "before", "chunk")
        for case in (
            _selfmod(f"{kind}-{objective}-{read}", hidden=hidden, objective=objective, read=read),
            _selfmod(
                f"{kind}-{objective}-{read}-tiny", tiny=True,
                **{**_TINY, "hidden": hidden and 4}, objective=objective, read=read,
            ),
        )
    ),
    _selfmod("silu", activation="silu"),
    _selfmod("silu-tiny", tiny=True, **_TINY, activation="silu", lr_max=0.5),
    _selfmod("one-token", tokens=1),
    _selfmod("no-token", tokens=0),
    _selfmod("no-batch", batch=0),
    _selfmod("whole-chunks", tokens=32),
    _selfmod("one-past-a-chunk", tokens=33),
    _selfmod("chunk-of-1", tokens=9, chunk_size=1),
    _selfmod("chunk-of-1-linear", tokens=9, chunk_size=1, hidden=None, read="after"),
    _selfmod("chunk-of-64", batch=1, tokens=150, heads=1, chunk_size=64, dim=64, hidden=64),
    _selfmod("chunk-of-150", batch=1, tokens=333, chunk_size=150, lr_bias=-4.0),
    _selfmod("odd-sizes", heads=3, dim=5, hidden=7, read="after"),
    _selfmod("odd-sizes-linear", heads=3, dim=5, hidden=None),
    _selfmod("one-wide", dim=1, hidden=3),
    _selfmod("narrow", dim=32, hidden=8),
    _selfmod("wide", batch=1, heads=1, dim=32, hidden=128),
    # States are kept at every seventh chunk or so: the backward has several stretches to go over.
    _selfmod("stretches", batch=1, tokens=140, heads=2, chunk_size=8, dim=32, hidden=32,
             lr_bias=-4.0, retention_bias=6.0),
    _selfmod("stretches-linear", batch=1, tokens=100, chunk_size=4, hidden=None, lr_bias=-4.0),
    _selfmod("carried", positions=[5, 16]),
    _selfmod("carried-linear", positions=[3, 31], hidden=None),
    _selfmod("carried-after", positions=[15, 33], read="after", objective="dot"),
    _selfmod("carried-chunk", positions=[3, 31], read="chunk"),
    _selfmod("carried-one-token", batch=4, positions=[15, 3, 0, 16], tokens=1),
    _selfmod("carried-no-token", positions=[16, 3], tokens=0),
    _selfmod("carried-in-a-long-chunk", tokens=150, chunk_size=128, positions=[70, 5],
             lr_bias=-4.0),
    _selfmod("carried-tiny", tiny=True, **_TINY, positions=[2]),
    _selfmod("packed", batch=1, tokens=50, bounds=[0, 7, 7, 39, 40, 50]),
    _selfmod("packed-carried", batch=1, tokens=50, bounds=[0, 7, 39, 50], positions=[3, 16, 31]),
    _selfmod("packed-tiny", tiny=True, **_TINY, bounds=[0, 1, 5], positions=[2, 1]),
    _selfmod("packed-nothing", batch=1, tokens=0, bounds=[0]),
)  # fmt: skip
