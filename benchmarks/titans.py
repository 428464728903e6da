"""The Titans memory: the bare operator against its definition, our layer against titans-pytorch's.

On a GPU also against flash-linear-attention's kernels of simpler recurrences; the definition, which
launches a dozen kernels for every token, is measured there with REFERENCE_TOKENS of them.

B batch, T tokens, H heads, D head size (of keys and values), C chunk size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

import hope_ext
from benchmarks import peers
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
    moved,
)
from hope_ext import testing

GATES = 3  # learning rate, momentum, decay: float32, one of each per token and head
GATE_BYTES = 4
REFERENCE_TOKENS = 256  # on a GPU
FLA = "flash-linear-attention"


def run(**arguments: Any) -> Any:
    return hope_ext.titans_memory(**arguments)


def inputs(setting: Setting, *, batch: int | None = None, tokens: int | None = None) -> dict:
    """Arguments of `hope_ext.titans_memory` with momentum and decay, shared by all who ask."""
    shape = setting.shape
    sizes = (batch or shape["B"], tokens or shape["T"], shape["H"], shape["D"], shape["C"])
    return _drawn(sizes, setting.dtype, setting.device)


@functools.lru_cache(maxsize=2)  # a GPU's shapes take seconds to draw
def _drawn(sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    batch, tokens, heads, dim, chunk_size = sizes
    return testing.titans_inputs(
        dtype,
        device,
        batch=batch,
        tokens=tokens,
        heads=heads,
        key=dim,
        value=dim,
        chunk_size=chunk_size,
    )


def check_arguments(setting: Setting) -> dict[str, Any]:
    """The benchmark's sizes, with two batch rows and four chunks and a half: several groups of
    chunks between checkpoints, and no more tokens than the definition can keep the states of."""
    shape = setting.shape
    tokens = min(shape["T"], 9 * shape["C"] // 2)
    return {**inputs(setting, batch=min(shape["B"], 2), tokens=tokens), "return_state": True}


def operator_work(setting: Setting) -> dict[str, Work]:
    """What no implementation does without: every input is read once per pass over the tokens and
    every output written once, and nothing is computed twice."""
    forward, backward = _passes(setting)
    both = Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
    return {FORWARD: forward, TRAINING: both}


def bounds(setting: Setting) -> dict[str, Work]:
    """The work of the design with checkpoints: its backward computes the states once more, 6 D^2
    flops per token and head."""
    shape = setting.shape
    forward, backward = _passes(setting)
    again = 6 * shape["D"] ** 2 * shape["B"] * shape["T"] * shape["H"]
    return {FORWARD: forward, BACKWARD: Work(backward.flops + again, backward.bytes)}


def _passes(setting: Setting) -> tuple[Work, Work]:
    shape, size = setting.shape, setting.dtype.itemsize
    tokens, dim = shape["B"] * shape["T"], shape["D"]
    flops = functools.partial(testing.titans_flops, tokens, shape["H"], dim, dim, shape["C"])
    rows, gates = tokens * shape["H"] * dim * size, tokens * shape["H"] * GATES * GATE_BYTES
    forward = Work(flops(), 4 * rows + gates)  # q, k, v; o
    backward = Work(flops(backward=True) - flops(), 7 * rows + 2 * gates)  # and do; dq, dk, dv
    return forward, backward


def operator_subject(setting: Setting, given: dict, work: dict[str, Work]) -> Subject:
    """A call of `titans_memory` with gradients of everything that it is given."""
    arguments = _pytree.tree_map(
        lambda x: x.detach().requires_grad_() if isinstance(x, Tensor) else x, given
    )
    leaves = [x for x in _pytree.tree_leaves(arguments) if isinstance(x, Tensor)]
    shape = setting.shape
    return Subject(lambda: run(**arguments), tuple(leaves), shape["B"] * shape["T"], work)


def by_definition(subject: Subject) -> Subject:
    """The same call on the definition in plain PyTorch."""
    definition = testing.backend("reference")(subject.forward)
    return Subject(definition, subject.leaves, subject.tokens, subject.work)


def bare(setting: Setting) -> Subject:
    return operator_subject(setting, inputs(setting), operator_work(setting))


def bare_reference(setting: Setting) -> Subject:
    return by_definition(bare(setting))


def fewer_tokens(shape: dict[str, int]) -> dict[str, int]:
    return {**shape, "T": min(shape["T"], REFERENCE_TOKENS)}


def gated_delta_rule(setting: Setting) -> Subject:
    rule, arguments = peers.gated_delta_rule(), inputs(setting)
    keep = torch.log1p(-arguments["decay"])  # it takes the gate's logarithm
    beta = arguments["lr"].to(setting.dtype)
    return _other(setting, lambda *x: rule(*x)[0], *_rows(arguments), keep, beta)


def ttt_linear(setting: Setting) -> Subject:
    """With its default chunks of 16 tokens."""
    rule, arguments = peers.ttt_linear(), inputs(setting)
    rate = arguments["lr"].to(setting.dtype).unsqueeze(-1)
    norm = torch.ones(setting.shape["H"], setting.shape["D"], device=setting.device)
    norm = norm.to(setting.dtype)
    return _other(
        setting, lambda *x: rule(*x)[0], *_rows(arguments), norm, torch.zeros_like(norm), rate
    )


def _rows(arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    return tuple(arguments[name] for name in "qkv")


def _other(setting: Setting, function: Callable[..., Tensor], *tensors: Tensor) -> Subject:
    """Another recurrence, whose output is like v: its bytes are counted and its flops are not."""
    leaves = tuple(x.detach().requires_grad_() for x in tensors)
    bytes_of = moved(leaves, leaves[2:3])
    return Subject(
        lambda: function(*leaves),
        leaves,
        setting.shape["B"] * setting.shape["T"],
        {direction: Work(0, moved_bytes) for direction, moved_bytes in bytes_of.items()},
    )


def layer(setting: Setting, module: nn.Module, work: dict[str, Work]) -> Subject:
    """A layer x [B, T, H * D] -> (y, state), with its projections.

    Its work is the operator's, which is given, and that of its own linear maps.
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
    from hope import TitansConfig, TitansMemory  # it needs more packages than the operators

    shape = setting.shape
    torch.manual_seed(0)
    config = TitansConfig(heads=shape["H"], head_dim=shape["D"], chunk_size=shape["C"])
    module = TitansMemory(shape["H"] * shape["D"], config)
    module.init_weights()
    return layer(setting, module, operator_work(setting))


def titans_pytorch_layer(setting: Setting) -> Subject:
    shape = setting.shape
    torch.manual_seed(0)
    module = peers.titans_pytorch(shape["H"], shape["D"], shape["C"])
    return layer(setting, module, operator_work(setting))


LAYER = Contest(
    "layer",
    (
        Row("titans-pytorch", titans_pytorch_layer, peer="titans-pytorch"),
        Row("ours", our_layer),
    ),
    "titans-pytorch",
)

BENCHMARK = Operator(
    stem="titans",
    letters="BTHDC",
    shapes={
        "cpu": ((2, 1024, 4, 64, 64),),
        "cuda": ((8, 4096, 16, 64, 64), (4, 8192, 8, 128, 64)),
    },
    contests={
        "cpu": (
            Contest("operator", (Row("reference", bare_reference), Row("ours", bare)), "reference"),
            LAYER,
        ),
        "cuda": (
            Contest(
                "operator",
                (
                    Row("reference", bare_reference, at=fewer_tokens),
                    Row("fla gated delta rule", gated_delta_rule, peer=FLA, compiles=True),
                    Row("fla ttt linear", ttt_linear, peer=FLA, compiles=True),
                    Row("ours", bare),
                ),
                "fla gated delta rule",
            ),
            LAYER,
        ),
    },
    run=run,
    check_arguments=check_arguments,
    quick=lambda shape: {**shape, "B": 1, "T": min(shape["T"], 2 * shape["C"])},
    bounds=bounds,
)
