"""Other people's implementations, each behind an optional import.

The `bench` extra of pyproject.toml pins their versions: pip install .[bench]. A peer that it does
not name (causal-conv1d, which has to be compiled) is measured in whatever version is here.

flash-linear-attention's kernels are compiled and tuned by Triton for each new size, which can take
minutes. Both end in caches on disk, so `compile_first` lets a process of its own do it, which can
be stopped: what it has not finished in its time is a row that says so.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

import build_config
from benchmarks.subjects import PASSES, Row, Setting

INSTALL = "pip install .[bench]"
Key = tuple[str, str, str]  # row, setting, pass


def pinned() -> dict[str, str]:
    """The version of every peer that pyproject.toml asks for."""
    return dict(requirement.split("==") for requirement in build_config.requirements(["bench"]))


def installed(peer: str) -> str | None:
    """The version of a peer that is here; None if it is not."""
    try:
        return metadata.version(peer)
    except metadata.PackageNotFoundError:
        return None


def why_not(peer: str) -> str | None:
    """Why a peer cannot be measured; None if it can."""
    found = installed(peer)
    wanted = pinned().get(peer)
    if found is None:
        return f"not installed: {INSTALL}" if wanted else "not installed"
    if wanted not in (None, found):
        return f"version {found} instead of {wanted}: {INSTALL}"
    return None


def titans_pytorch(
    heads: int, head_dim: int, chunk_size: int, expansion: float | None = None
) -> nn.Module:
    """titans-pytorch's layer with momentum and decay; x [B, T, heads * head_dim].

    Its memory is a matrix per head, or with `expansion` an MLP of two layers, with a residual norm
    around it.
    """
    from titans_pytorch import NeuralMemory

    return NeuralMemory(
        dim=heads * head_dim,
        heads=heads,
        dim_head=head_dim,
        chunk_size=chunk_size,
        default_model_kwargs=(
            {"depth": 1} if expansion is None else {"depth": 2, "expansion_factor": expansion}
        ),
    )


def gated_delta_rule() -> Callable[..., Any]:
    """flash-linear-attention's: a simpler recurrence, with one gate and no momentum."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule


def ttt_linear() -> Callable[..., Any]:
    """flash-linear-attention's TTT: a linear memory with a LayerNorm inside the loss."""
    from fla.ops.ttt import chunk_ttt_linear

    return chunk_ttt_linear


def causal_conv1d() -> Callable[..., Any]:
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn


# ---- compiling ahead -----------------------------------------------------------------------------


def compile_first(jobs: Sequence[tuple[Row, Setting]], seconds: float) -> dict[Key, str]:
    """Calls each row at its setting, both passes, in another process.

    Returns what failed there or was not finished in that many seconds, with the reason.
    """
    wanted = [(row.name, str(setting), direction) for row, setting in jobs for direction in PASSES]
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_call_all, args=(list(jobs), sender), daemon=True)
    end = time.monotonic() + seconds
    process.start()
    sender.close()
    found: dict[Key, str | None] = {}
    left_over = f"not compiled within {seconds:.0f} s"
    try:
        while len(found) < len(wanted) and receiver.poll(max(0, end - time.monotonic())):
            key, reason = receiver.recv()
            found[key] = reason
    except EOFError:
        left_over = "its process ended early"
    process.terminate()
    process.join(10)
    if process.is_alive():
        process.kill()
        process.join()
    return {key: reason for key in wanted if (reason := found.get(key, left_over))}


def _call_all(jobs: list[tuple[Row, Setting]], sender: Connection) -> None:
    for row, setting in jobs:
        for direction in PASSES:
            reason = None
            try:
                row.prepare(setting).call(direction)()
                if setting.device == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:  # of whatever kind: a peer's failure is a row that says so
                reason = f"fails: {type(error).__name__}: {error}"
            sender.send(((row.name, str(setting), direction), reason))
