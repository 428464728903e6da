"""Inputs, costs and cases of the Titans memory."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import hope_ext
from hope_ext.testing.case import Case


def titans_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    batch: int = 2,
    tokens: int = 37,
    heads: int = 2,
    key: int = 16,
    value: int = 16,
    chunk_size: int = 16,
    momentum: bool = True,
    decay: bool = True,
    objective: str = "l2",
    read: str = "after",
    hidden: int | None = None,
    activation: str = "gelu",
    residual: bool = True,
    norm: bool = False,
    bounds: list[int] | None = None,
    positions: list[int] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Unit keys and queries, gates in the inner loop's stable range; drawn in float64.

    hidden: F of a deep memory; None: a linear one.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, to: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, to)

    def uniform(high: float) -> Tensor:
        draw = torch.rand((batch, tokens, heads), generator=generator, dtype=torch.float64)
        return (high * draw).to(device, wide)

    sizes = [(key, value)] if hidden is None else [(key, hidden), (hidden, value)]

    def memory(*leading: int) -> tuple[Tensor, ...]:
        return tuple(normal(*leading, *size, to=wide, scale=size[0] ** -0.5) for size in sizes)

    plain = hidden is None and not norm
    arguments: dict[str, Any] = {
        "q": F.normalize(normal(batch, tokens, heads, key, to=torch.float64), dim=-1).to(dtype),
        "k": F.normalize(normal(batch, tokens, heads, key, to=torch.float64), dim=-1).to(dtype),
        "v": normal(batch, tokens, heads, value),
        "lr": uniform((2.0 if plain else 0.3) / chunk_size**0.5),
        "weights": memory(heads),
        "momentum": uniform(0.9) if momentum else None,
        "decay": uniform(0.2) if decay else None,
        "chunk_size": chunk_size,
        "objective": objective,
        "read": read,
    }
    sequences = batch
    if bounds is not None:
        arguments["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
        sequences = len(bounds) - 1
    if positions is not None:
        draw = [memory(sequences, heads) for _ in range(3)]
        arguments["state"] = hope_ext.TitansState(
            weights=draw[0],
            momenta=draw[1] if momentum else None,
            anchor=draw[2],
            position=torch.tensor(positions, device=device),
            chunk_size=chunk_size,
        )
    if not plain:
        arguments |= {"activation": activation, "residual": residual}
    if norm:
        arguments["norm"] = "layer"
        arguments["norm_weight"] = 1 + normal(heads, value, to=wide, scale=0.2)
        arguments["norm_bias"] = normal(heads, value, to=wide, scale=0.2)
        # Rows of few columns may have next to no variance, and then nobody's errors say anything.
        arguments["norm_eps"] = 1e-6 if value >= 16 else 0.1
    return arguments


CUDA_HEAD_SIZES = {16, 32, 64, 128}  # key and value sizes, csrc/titans/titans_cuda.h


def _titans(name: str, *, tiny: bool = False, **options: Any) -> Case:
    make = functools.partial(titans_inputs, **options)
    sizes = {options.get(name, 16) for name in ("key", "value")}
    cuda = sizes <= CUDA_HEAD_SIZES and options.get("hidden", 16) % 16 == 0
    return Case("titans", name, hope_ext.titans_memory, make, tiny, cuda=cuda)


_TINY: dict[str, Any] = {"batch": 1, "tokens": 5, "heads": 2, "key": 3, "value": 2, "chunk_size": 3}

_DEEP_TINY: dict[str, Any] = {**_TINY, "value": 3, "hidden": 4}

CASES: tuple[Case, ...] = (
    _titans("plain"),
    *(
        case
        for objective in ("l2", "dot")
        for read in ("after", "before", "chunk")
        for case in (
            _titans(f"{objective}-{read}", objective=objective, read=read),
            _titans(f"{objective}-{read}-tiny", tiny=True, objective=objective, read=read, **_TINY),
        )
    ),
    _titans("no-momentum", momentum=False),
    _titans("no-decay", decay=False),
    _titans("neither", momentum=False, decay=False),
    _titans("neither-dot-before", momentum=False, decay=False, objective="dot", read="before"),
    _titans("no-momentum-tiny", tiny=True, momentum=False, **_TINY),
    _titans("neither-tiny", tiny=True, momentum=False, decay=False, read="before", **_TINY),
    _titans("one-token", tokens=1),
    _titans("one-token-alone", batch=1, heads=1, tokens=1),
    _titans("no-token", tokens=0),
    _titans("no-batch", batch=0),
    _titans("no-batch-one-token", batch=0, tokens=1),
    _titans("whole-chunks", tokens=32),
    _titans("one-past-a-chunk", tokens=33),
    _titans("chunk-of-1", tokens=9, chunk_size=1),
    _titans("chunk-of-32", tokens=70, chunk_size=32, key=32, value=32),
    _titans("chunk-of-64", batch=1, tokens=200, chunk_size=64, key=64, value=64),
    _titans("chunk-of-150", batch=1, tokens=333, chunk_size=150),
    _titans("wide-values", key=16, value=32),
    _titans("wide-keys", key=64, value=16),
    _titans("odd-sizes", key=5, value=7, heads=3),
    _titans("head-128", tokens=70, key=128, value=128, chunk_size=64),
    _titans("chunk-of-128", tokens=150, chunk_size=128, value=32),
    _titans("keys-32-values-128", batch=1, key=32, value=128, chunk_size=32),
    _titans("keys-128-values-32", batch=1, heads=1, key=128, value=32, chunk_size=32),
    # States are kept at every third chunk or so: the backward has several stretches to go over.
    _titans("stretches", batch=1, tokens=140, key=64, value=64),
    _titans("stretches-no-momentum", batch=1, tokens=100, key=64, value=128, momentum=False),
    _titans(
        "stretches-packed", batch=1, tokens=150, heads=1, key=64, value=32,
        bounds=[0, 50, 50, 150], positions=[7, 5, 0],
    ),
    _titans("carried", positions=[5, 16]),
    _titans("carried-before", positions=[15, 33], read="before"),
    _titans("carried-chunk", positions=[3, 31], read="chunk"),
    _titans("carried-one-token", positions=[15, 3], tokens=1),
    _titans(
        "carried-one-token-32", batch=16, tokens=1, positions=8 * [31, 3],
        key=32, value=64, chunk_size=32,
    ),
    _titans(
        "carried-one-token-64", batch=16, tokens=1, positions=8 * [32, 3],
        key=64, value=16, read="before",
    ),
    _titans(
        "carried-one-token-128", batch=16, tokens=1, positions=8 * [7, 3],
        key=128, value=32, read="chunk",
    ),
    _titans("carried-no-token", positions=[16, 3], tokens=0),
    _titans("carried-no-momentum", positions=[9, 2], momentum=False),
    _titans("carried-in-a-long-chunk", tokens=150, chunk_size=128, positions=[70, 5]),
    _titans("carried-tiny", tiny=True, positions=[2], **_TINY),
    _titans("packed", batch=1, tokens=50, bounds=[0, 7, 7, 39, 40, 50]),
    _titans("packed-carried", batch=1, tokens=50, bounds=[0, 7, 39, 50], positions=[3, 16, 31]),
    _titans(
        "packed-long-chunks", batch=1, tokens=200, chunk_size=128,
        bounds=[0, 70, 71, 200], positions=[100, 127, 3],
    ),
    _titans("packed-tiny", tiny=True, **_TINY, bounds=[0, 1, 5], positions=[2, 1]),
    _titans("packed-nothing", batch=1, tokens=0, bounds=[0]),
    # Deep memories, and memories with a norm.
    *(
        case
        for objective in ("l2", "dot")
        for read in ("after", "before", "chunk")
        for case in (
            _titans(f"deep-{objective}-{read}", hidden=32, objective=objective, read=read),
            _titans(
                f"deep-{objective}-{read}-tiny",
                tiny=True, **_DEEP_TINY, objective=objective, read=read,
            ),
            _titans(
                f"norm-{objective}-{read}-tiny",
                tiny=True, **{**_TINY, "value": 3}, norm=True, objective=objective, read=read,
            ),
            _titans(
                f"deep-norm-{objective}-{read}-tiny",
                tiny=True, **_DEEP_TINY, norm=True, objective=objective, read=read,
                activation="silu",
            ),
        )
    ),
    _titans("deep-silu", hidden=16, activation="silu"),
    _titans("deep-silu-tiny", tiny=True, **_DEEP_TINY, activation="silu"),
    _titans("deep-alone-tiny", tiny=True, **_DEEP_TINY, residual=False),
    _titans("deep-alone-norm-tiny", tiny=True, **_DEEP_TINY, residual=False, norm=True),
    _titans("norm-alone-tiny", tiny=True, **_TINY, residual=False, norm=True),
    _titans("deep-neither", hidden=32, momentum=False, decay=False),
    _titans(
        "deep-neither-tiny", tiny=True, **_DEEP_TINY, momentum=False, decay=False, read="before"
    ),
    _titans("deep-one-token", hidden=32, tokens=1),
    _titans("deep-no-token", hidden=32, tokens=0),
    _titans("deep-no-batch", hidden=32, batch=0),
    _titans("deep-odd-sizes", key=5, value=5, hidden=7, heads=3, norm=True),
    _titans("deep-narrow", hidden=8, key=32, value=32, residual=False),
    _titans("deep-64", batch=1, heads=1, tokens=140, chunk_size=64, key=64, value=64, hidden=256),
    _titans("deep-128", batch=1, heads=1, tokens=70, chunk_size=64, key=128, value=128, hidden=128),
    _titans("deep-chunk-of-150", batch=1, tokens=333, chunk_size=150, hidden=16),
    _titans("deep-norm", hidden=64, norm=True),
    _titans("norm", norm=True),
    _titans("norm-wide-values", norm=True, residual=False, value=32),
    _titans("deep-carried", positions=[5, 16], hidden=32),
    _titans("deep-carried-chunk", positions=[3, 31], hidden=32, read="chunk"),
    _titans(
        "deep-carried-one-token", batch=16, positions=8 * [15, 3], tokens=1, hidden=32, norm=True
    ),
    _titans("deep-carried-tiny", tiny=True, **_DEEP_TINY, positions=[2], norm=True),
    _titans(
        "deep-packed-carried", batch=1, tokens=50, bounds=[0, 7, 39, 50], positions=[3, 16, 31],
        hidden=32,
    ),
    _titans("deep-packed-tiny", tiny=True, **_DEEP_TINY, bounds=[0, 1, 5], positions=[2, 1]),
)  # fmt: skip
