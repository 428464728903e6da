"""HOPE's self-modifying memory: the operator against its definition and against plain PyTorch.

The plain PyTorch is what one writes first: the gradients of a chunk's tokens by vmap of grad, then
a loop over the tokens. It computes the same and is differentiable, too.

B batch, T tokens, H heads, D head size, F hidden size (of deep memories), C chunk
size.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree

import hope_ext
from benchmarks import titans, titans_deep
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
NAMES = ("k", "v", "lr", "retention", "memory")
Memory = tuple[Tensor, ...]


def run(**arguments: Any) -> Any:
    return hope_ext.self_modifying_memory(**arguments)


def inputs(setting: Setting, *, batch: int | None = None, tokens: int | None = None) -> dict:
    """Arguments of `hope_ext.self_modifying_memory`, gates as layers begin with them."""
    shape = setting.shape
    return testing.selfmod_inputs(
        setting.dtype,
        setting.device,
        batch=batch or shape["B"],
        tokens=tokens or shape["T"],
        heads=shape["H"],
        dim=shape["D"],
        hidden=shape.get("F"),
        chunk_size=shape["C"],
        lr_bias=-5.0,
        retention_bias=12.0,
    )


def check_arguments(setting: Setting) -> dict[str, Any]:
    """The benchmark's sizes, with one batch row and six chunks and a half: more than lie between
    two checkpoints, and no more tokens than the definition can keep the states of."""
    tokens = min(setting.shape["T"], 13 * setting.shape["C"] // 2)
    return {**inputs(setting, batch=1, tokens=tokens), "return_state": True}


def operator_work(setting: Setting) -> dict[str, Work]:
    """The forward's products and, for both passes, two more for each of them, whatever is computed
    again or skipped; of bytes x, q and o, and their gradients."""
    shape = setting.shape
    tokens, hidden = shape["B"] * shape["T"], shape.get("F", 0)
    forward = testing.selfmod_flops(tokens, shape["H"], shape["D"], hidden, shape["C"])
    rows = tokens * shape["H"] * shape["D"] * setting.dtype.itemsize
    return {FORWARD: Work(forward, 3 * rows), TRAINING: Work(3 * forward, 8 * rows)}


def subject(setting: Setting, function: Any) -> Subject:
    """A call with gradients of everything that it is given."""
    leaves: list[Tensor] = []

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    arguments = _pytree.tree_map(leaf, inputs(setting))
    tokens = setting.shape["B"] * setting.shape["T"]
    return Subject(lambda: function(**arguments), tuple(leaves), tokens, operator_work(setting))


def bare(setting: Setting) -> Subject:
    return subject(setting, run)


def bare_reference(setting: Setting) -> Subject:
    return subject(setting, testing.backend("reference")(run))


def fewer_tokens(shape: dict[str, int]) -> dict[str, int]:
    """Token by token, PyTorch keeps a state for each."""
    return {**shape, "T": min(shape["T"], REFERENCE_TOKENS)}


# ---- plain PyTorch -------------------------------------------------------------------------------


def read(memory: Memory, x: Tensor) -> Tensor:
    """M(x), x [..., D]: x W, or x + act(x W1) W2, without the `x +` where M maps to one number."""
    if len(memory) == 1:
        return x @ memory[0]
    core = F.gelu(x @ memory[0], approximate="tanh") @ memory[1]
    return core if memory[1].shape[-1] == 1 else x + core


def inner_loss(memory: Memory, k: Tensor, value: Tensor) -> Tensor:
    return (read(memory, k) - value).square().sum() / 2


@functools.cache
def gradients_of_tokens() -> Any:
    """(memory [B, H, ., .], k, value [B, H, n, .]) -> gradients [B, H, n, ., .]."""
    of_tokens = torch.func.vmap(torch.func.grad(inner_loss), in_dims=(None, 0, 0))
    return torch.func.vmap(torch.func.vmap(of_tokens))


def plain(
    x: Tensor,
    q: Tensor,
    memories: hope_ext.SelfModifyingWeights,
    lr_bias: Tensor,
    retention_bias: Tensor,
    *,
    chunk_size: int,
    lr_max: float,
    **defaults: Any,
) -> Tensor:
    """gelu, l2, read "before"; whole sequences."""
    expected = {"activation": "gelu", "objective": "l2", "read": "before"}
    if defaults != expected:
        raise ValueError(f"expected {expected}, got {defaults}")
    batch, tokens = x.shape[:2]
    x, q = x.transpose(1, 2), q.transpose(1, 2)  # [B, H, T, D]
    weights = {
        name: tuple(w.expand(batch, *w.shape) for w in getattr(memories, name)) for name in NAMES
    }
    outputs = []
    for start in range(0, tokens, chunk_size):
        here = slice(start, start + chunk_size)
        k, v, lr, retention = (read(weights[name], x[:, :, here]) for name in NAMES[:4])
        k = F.normalize(k, dim=-1, eps=1e-6)
        eta = lr_max * (lr + lr_bias[:, None, None]).sigmoid()
        alpha = (retention + retention_bias[:, None, None]).sigmoid()
        gradients = {
            name: gradients_of_tokens()(memory, k, read(memory, v))
            for name, memory in weights.items()
        }
        for t in range(k.shape[2]):
            token = slice(t, t + 1)
            outputs.append(read(weights["memory"], q[:, :, start + t : start + t + 1]))
            eta_t, alpha_t, k_t = eta[:, :, token], alpha[:, :, token], k[:, :, token]
            for name, memory in weights.items():
                steps = [g[:, :, t] for g in gradients[name]]
                steps[0] = steps[0] + k_t.mT @ (k_t @ memory[0])
                weights[name] = tuple(
                    alpha_t * w - eta_t * step for w, step in zip(memory, steps, strict=True)
                )
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


def bare_plain(setting: Setting) -> Subject:
    return subject(setting, plain)


def our_layer(setting: Setting) -> Subject:
    from hope import HopeConfig, SelfModifyingMemory

    shape = setting.shape
    torch.manual_seed(0)
    config = HopeConfig(
        heads=shape["H"],
        head_dim=shape["D"],
        chunk_size=shape["C"],
        expansion=max(1, shape["F"] // shape["D"]),
    )
    module = SelfModifyingMemory(shape["H"] * shape["D"], config)
    module.init_weights()
    return titans.layer(setting, module, operator_work(setting))


def bounds(setting: Setting) -> dict[str, Work]:
    """The work of the design with checkpoints: its backward computes the states once more."""
    forward, both = (operator_work(setting)[direction] for direction in (FORWARD, TRAINING))
    return {FORWARD: forward, BACKWARD: Work(both.flops, both.bytes - forward.bytes)}


OPERATOR = Contest(
    "operator",
    (
        Row("reference", bare_reference, at=fewer_tokens),
        Row("plain PyTorch", bare_plain, at=fewer_tokens),
        Row("ours", bare),
    ),
    "ours",
)
# Five memories, against the one deep memory of a Titans layer of the same size.
LAYER = Contest(
    "layer", (Row("Titans layer", titans_deep.our_layer), Row("ours", our_layer)), "Titans layer"
)

BENCHMARK = Operator(
    stem="selfmod",
    letters="BTHDFC",
    shapes={
        "cpu": ((1, 256, 1, 64, 64, 64), (2, 1024, 4, 64, 64, 64)),
        "cuda": ((8, 4096, 16, 64, 64, 64), (4, 8192, 8, 128, 128, 64)),
    },
    contests={"cpu": (OPERATOR, LAYER), "cuda": (OPERATOR, LAYER)},
    run=run,
    check_arguments=check_arguments,
    quick=lambda shape: {**shape, "B": 1, "T": min(shape["T"], 2 * shape["C"])},
    roofs={"cpu": ("flops",), "cuda": ("flops", "bytes")},
    bounds=bounds,
)
LINEAR = replace(
    BENCHMARK,
    variant="linear",
    letters="BTHDC",
    contests={"cpu": (OPERATOR,), "cuda": (OPERATOR,)},
    shapes={
        "cpu": ((2, 1024, 4, 64, 64),),
        "cuda": ((8, 4096, 16, 64, 64), (4, 8192, 8, 128, 64)),
    },
)
