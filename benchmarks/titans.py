"""The Titans memory: the bare operator against its definition, our layer against titans-pytorch's.

B batch, T tokens, H heads, D head size (of keys and values), C chunk size.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from hope import TitansConfig, TitansMemory
from torch import Tensor, nn

import hope_ext
from benchmarks import peers
from benchmarks.subjects import FORWARD, TRAINING, Contest, Operator, Row, Setting, Subject, Work
from hope_ext import testing

GATES = 3  # learning rate, momentum, decay: float32, one of each per token and head
GATE_BYTES = 4


def run(**arguments: Any) -> Any:
    return hope_ext.titans_memory(**arguments)


def inputs(setting: Setting, *, batch: int | None = None, tokens: int | None = None) -> dict:
    """Arguments of `hope_ext.titans_memory` with momentum and decay."""
    shape = setting.shape
    return testing.titans_inputs(
        setting.dtype,
        setting.device,
        batch=shape["B"] if batch is None else batch,
        tokens=shape["T"] if tokens is None else tokens,
        heads=shape["H"],
        key=shape["D"],
        value=shape["D"],
        chunk_size=shape["C"],
    )


def check_arguments(setting: Setting) -> dict[str, Any]:
    """The benchmark's sizes, with no more tokens than two chunks and a half, and two batch rows:
    the definition keeps the state of every token."""
    shape = setting.shape
    tokens = min(shape["T"], 5 * shape["C"] // 2)
    return {**inputs(setting, batch=min(shape["B"], 2), tokens=tokens), "return_state": True}


def operator_work(setting: Setting) -> dict[str, Work]:
    """Every input is read once per pass over the tokens and every output written once."""
    shape, size = setting.shape, setting.dtype.itemsize
    tokens, dim = shape["B"] * shape["T"], shape["D"]
    flops = functools.partial(testing.titans_flops, tokens, shape["H"], dim, dim, shape["C"])
    rows, gates = tokens * shape["H"] * dim * size, tokens * shape["H"] * GATES * GATE_BYTES
    forward = 4 * rows + gates  # q, k, v; o
    backward = 7 * rows + 2 * gates  # q, k, v, do; dq, dk, dv
    return {
        FORWARD: Work(flops(), forward),
        TRAINING: Work(flops(backward=True), forward + backward),
    }


def bare(setting: Setting) -> Subject:
    arguments = inputs(setting)
    leaves = [x for x in arguments.values() if isinstance(x, Tensor)] + [*arguments["weights"]]
    for leaf in leaves:
        leaf.requires_grad_()
    shape = setting.shape
    return Subject(
        lambda: run(**arguments),
        tuple(leaves),
        shape["B"] * shape["T"],
        operator_work(setting),
    )


def bare_reference(setting: Setting) -> Subject:
    subject = bare(setting)
    definition = testing.backend("reference")(subject.forward)
    return Subject(definition, subject.leaves, subject.tokens, subject.work)


def layer(setting: Setting, module: nn.Module) -> Subject:
    """A layer x [B, T, H * D] -> (y, state), with its projections.

    Its work is the operator's, and that of its own linear maps.
    """
    shape = setting.shape
    tokens = shape["B"] * shape["T"]
    module.to(setting.device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape["B"], shape["T"], shape["H"] * shape["D"], generator=generator)
    x = x.to(setting.device).requires_grad_()
    mixed = torch.autocast(setting.device, setting.dtype, enabled=setting.dtype != torch.float32)

    def forward() -> Tensor:
        with mixed:
            return module(x)[0]

    maps = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
    work = operator_work(setting)
    return Subject(
        forward,
        (x, *module.parameters()),
        tokens,
        {
            FORWARD: Work(work[FORWARD].flops + 2 * tokens * maps),
            TRAINING: Work(work[TRAINING].flops + 6 * tokens * maps),
        },
    )


def our_layer(setting: Setting) -> Subject:
    shape = setting.shape
    torch.manual_seed(0)
    config = TitansConfig(heads=shape["H"], head_dim=shape["D"], chunk_size=shape["C"])
    module = TitansMemory(shape["H"] * shape["D"], config)
    module.init_weights()
    return layer(setting, module)


def titans_pytorch_layer(setting: Setting) -> Subject:
    shape = setting.shape
    torch.manual_seed(0)
    return layer(setting, peers.titans_pytorch(shape["H"], shape["D"], shape["C"]))


BENCHMARK = Operator(
    stem="titans",
    letters="BTHDC",
    shapes={
        "cpu": ((2, 1024, 4, 64, 64),),
        "cuda": ((8, 4096, 16, 64, 64), (4, 8192, 8, 128, 64)),
    },
    contests=(
        Contest("operator", (Row("reference", bare_reference), Row("ours", bare)), "reference"),
        Contest(
            "layer",
            (
                Row("titans-pytorch", titans_pytorch_layer, peer="titans-pytorch"),
                Row("ours", our_layer),
            ),
            "titans-pytorch",
        ),
    ),
    run=run,
    check_arguments=check_arguments,
    quick=lambda shape: {**shape, "B": 1, "T": min(shape["T"], 2 * shape["C"])},
)
