"""The deep Titans memory: the bare operator against its definition, our layer against
titans-pytorch's with its own default memory, an MLP of two layers.

B batch, T tokens, H heads, D head size, F hidden size, C chunk size.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import peers, titans
from benchmarks.subjects import (
    BACKWARD,
    FORWARD,
    TRAINING,
    Contest,
    Operator,
    Row,
    Setting,
    Subject,
    Work,
)
from hope_ext import testing

REFERENCE_TOKENS = 64


def inputs(setting: Setting, *, batch: int | None = None, tokens: int | None = None) -> dict:
    """Arguments of `hope_ext.titans_memory` with momentum and decay."""
    shape = setting.shape
    return testing.titans_inputs(
        setting.dtype,
        setting.device,
        batch=batch or shape["B"],
        tokens=tokens or shape["T"],
        heads=shape["H"],
        key=shape["D"],
        value=shape["D"],
        hidden=shape["F"],
        chunk_size=shape["C"],
    )


def check_arguments(setting: Setting) -> dict[str, Any]:
    """The benchmark's sizes, with one batch row and six chunks and a half: more than lie between
    two checkpoints, and no more tokens than the definition can keep the states of."""
    tokens = min(setting.shape["T"], 13 * setting.shape["C"] // 2)
    return {**inputs(setting, batch=1, tokens=tokens), "return_state": True}


def operator_work(setting: Setting) -> dict[str, Work]:
    """Operations as `titans_flops` counts them; bytes as for a linear memory."""
    batch, tokens, heads, dim, hidden, chunk = (setting.shape[letter] for letter in "BTHDFC")
    sizes = (batch * tokens, heads, dim, dim, chunk)
    moved = titans.operator_work(setting)
    return {
        direction: Work(
            testing.titans_flops(*sizes, hidden=hidden, backward=direction == TRAINING),
            moved[direction].bytes,
        )
        for direction in (FORWARD, TRAINING)
    }


def bounds(setting: Setting) -> dict[str, Work]:
    """The work of the design with checkpoints: its backward computes the states once more, 14 D F
    flops per token and head."""
    forward, both = (operator_work(setting)[direction] for direction in (FORWARD, TRAINING))
    again = 14 * setting.shape["D"] * setting.shape["F"] * _rows(setting)
    moved = titans.bounds(setting)
    return {
        FORWARD: forward,
        BACKWARD: Work(both.flops - forward.flops + again, moved[BACKWARD].bytes),
    }


def _rows(setting: Setting) -> int:
    return setting.shape["B"] * setting.shape["T"] * setting.shape["H"]


def bare(setting: Setting) -> Subject:
    return titans.operator_subject(setting, inputs(setting), operator_work(setting))


def bare_reference(setting: Setting) -> Subject:
    return titans.by_definition(bare(setting))


def fewer_tokens(shape: dict[str, int]) -> dict[str, int]:
    """The definition keeps a state for every token."""
    return {**shape, "T": min(shape["T"], REFERENCE_TOKENS)}


def our_layer(setting: Setting) -> Subject:
    from hope import TitansConfig, TitansMemory

    shape = setting.shape
    torch.manual_seed(0)
    config = TitansConfig(
        heads=shape["H"],
        head_dim=shape["D"],
        chunk_size=shape["C"],
        memory="deep",
        expansion=shape["F"] // shape["D"],
    )
    module = TitansMemory(shape["H"] * shape["D"], config)
    module.init_weights()
    return titans.layer(setting, module, operator_work(setting))


def titans_pytorch_layer(setting: Setting) -> Subject:
    shape = setting.shape
    torch.manual_seed(0)
    module = peers.titans_pytorch(
        shape["H"], shape["D"], shape["C"], expansion=shape["F"] / shape["D"]
    )
    return titans.layer(setting, module, operator_work(setting))


CONTESTS = (
    Contest(
        "operator",
        (Row("reference", bare_reference, at=fewer_tokens), Row("ours", bare)),
        "ours",
    ),
    Contest(
        "layer",
        (
            Row("titans-pytorch", titans_pytorch_layer, peer="titans-pytorch"),
            Row("ours", our_layer),
        ),
        "titans-pytorch",
    ),
)

BENCHMARK = Operator(
    stem="titans",
    variant="deep",
    letters="BTHDFC",
    shapes={
        "cpu": ((2, 1024, 4, 64, 256, 64),),
        "cuda": (
            (8, 4096, 16, 64, 64, 64),
            (8, 4096, 16, 64, 256, 64),
            (4, 8192, 8, 128, 128, 64),
        ),
    },
    contests={"cpu": CONTESTS, "cuda": CONTESTS},
    run=titans.run,
    check_arguments=check_arguments,
    quick=lambda shape: {**shape, "B": 1, "T": min(shape["T"], 2 * shape["C"])},
    bounds=bounds,
)
