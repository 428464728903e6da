"""What tests/test_hope_parallel.py has ranks do: each function runs on all of them."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from hope.config import (
    AttentionConfig,
    CmsConfig,
    HopeConfig,
    MacConfig,
    MagConfig,
    MalConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TitansConfig,
    TrainConfig,
)
from hope.model import LanguageModel
from hope.optim.base import local
from hope.parallel import clip_gradients, make_mesh, parallelize, part, whole
from hope.parallel.memory import training_memory
from hope.train import make_optimizer
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Chunks that end in the middle of a rank's part of a sequence.
_SIZES = {"heads": 4, "head_dim": 8}
_CMS = CmsConfig(chunk_sizes=(5, 16))
_MODEL = ModelConfig(dim=32, layers=2, vocab_size=32, mlp_ratio=2.0)
MODELS = {
    "titans": replace(_MODEL, mixer=TitansConfig(**_SIZES, chunk_size=8)),
    "titans-deep": replace(
        _MODEL, mixer=TitansConfig(**_SIZES, chunk_size=8, memory="deep", norm="layer"), mlp="gelu"
    ),
    "hope": replace(_MODEL, mixer=HopeConfig(**_SIZES, chunk_size=8)),
    "hope-cms": replace(_MODEL, mixer=HopeConfig(**_SIZES, chunk_size=8), cms=_CMS),
    "attention": replace(_MODEL, mixer=AttentionConfig(**_SIZES, conv_width=3)),
    "attention-cms": replace(
        _MODEL, mixer=AttentionConfig(**_SIZES), cms=replace(_CMS, updates=False)
    ),
    "nested": replace(
        _MODEL,
        mixer=AttentionConfig(**_SIZES),
        cms=CmsConfig(chunk_sizes=(4, 16), variant="nested"),
    ),
    "mac": replace(_MODEL, mixer=MacConfig(**_SIZES, chunk_size=8, segment=16)),
    "mag": replace(_MODEL, mixer=MagConfig(**_SIZES, chunk_size=8, window=16)),
    "mal": replace(_MODEL, mixer=MalConfig(**_SIZES, chunk_size=8, window=16)),
}
_ROUNDING = 2e-5  # of a tensor's norm; measured: about 1e-6


def batch(rows: int = 4, tokens: int = 48, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens and targets, the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(32, (rows, tokens + 1), generator=generator)
    return drawn[:, :-1], drawn[:, 1:]


def model_of(name: str) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(MODELS[name])


def is_close(got: Tensor, expected: Tensor, what: str) -> None:
    error = (got - expected).norm() / expected.norm().clamp(min=1e-6)
    assert error < _ROUNDING, f"{what}: {error:.2e}"


def gradients(name: str, config: ParallelConfig, again: bool = False) -> None:
    """Loss and gradients of a model on this grid are those of one process.

    again: blocks compute their activations again in the backward.
    """
    tokens, targets = batch()
    alone = model_of(name)
    expected = alone.loss(tokens, targets)
    expected.backward()

    mesh = make_mesh(config, torch.device("cpu"))
    model = model_of(name)
    objective = parallelize(model, config, mesh)
    model.checkpoint_activations = again
    for _ in range(2):  # the second time no form of a state is told
        model.zero_grad()
        loss = objective(part(tokens, mesh), part(targets, mesh))
        loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    is_close(mean / dist.get_world_size(), expected.detach(), "loss")
    found = whole(model, {n: p.grad for n, p in model.named_parameters()})
    for parameter, p in alone.named_parameters():
        is_close(found[parameter], p.grad, parameter)


def states(name: str, config: ParallelConfig) -> None:
    """The last rank's memories after a text are those of one process, as are all logits."""
    tokens, _ = batch()
    mesh = make_mesh(config, torch.device("cpu"))
    model, alone = model_of(name), model_of(name)
    parallelize(model, config, mesh)
    with torch.no_grad():
        logits, state = model(part(tokens, mesh), return_state=True)
        all_logits, all_state = alone(tokens, return_state=True)
    is_close(logits, part(all_logits, mesh), "logits")
    if mesh.get_local_rank("sequence") == config.sequence - 1:
        for got, expected in zip(
            pytree.tree_leaves(state), pytree.tree_leaves(all_state), strict=True
        ):
            if isinstance(got, Tensor) and got.is_floating_point():
                is_close(got, expected, "state")
            else:
                assert got == expected if isinstance(got, int) else got.equal(expected)


def training(name: str, config: ParallelConfig, periods: tuple[int, ...] = ()) -> None:
    """Some steps with a clipped gradient: loss, norm and weights are those of one process."""
    train = TrainConfig(lr=3e-3, clip=0.5, level_periods=periods)
    mesh = make_mesh(config, torch.device("cpu"))
    model, alone = model_of(name), model_of(name)
    objective = parallelize(model, config, mesh)
    optimizer, optimizer_alone = make_optimizer(model, train), make_optimizer(alone, train)
    for step in range(3):
        tokens, targets = batch(seed=step)
        expected = alone.loss(tokens, targets)
        expected.backward()
        expected_norm = nn.utils.clip_grad_norm_(alone.parameters(), train.clip)
        optimizer_alone.step()
        optimizer_alone.zero_grad()
        loss = objective(part(tokens, mesh), part(targets, mesh))
        loss.backward()
        norm = clip_gradients(model.parameters(), train.clip)
        optimizer.step()
        optimizer.zero_grad()
        is_close(norm, expected_norm, "norm")
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        is_close(mean / dist.get_world_size(), expected.detach(), "loss")
    found = whole(model, dict(model.named_parameters()))
    for parameter, p in alone.named_parameters():
        # AdamW divides small gradients by their size, and so their rounding, too.
        error = (found[parameter] - p).abs().max() / train.lr
        assert error < 0.02, f"{parameter}: {error:.2e} of a step"


def held(name: str, config: ParallelConfig) -> None:
    """The rank with the most of a model's parameters has as many as `hope memory` says."""
    model = model_of(name)
    parallelize(model, config, make_mesh(config, torch.device("cpu")))
    count = torch.tensor(sum(local(p).numel() for p in model.parameters()))
    dist.all_reduce(count, dist.ReduceOp.MAX)
    memory = training_memory(RunConfig(model=MODELS[name]), config, dist.get_world_size())
    assert count == memory.held
    assert memory.weights == 4 * memory.held


def bfloat16(name: str, config: ParallelConfig) -> None:
    """With activations of bfloat16 states keep their own dtypes, and the loss is about the same."""
    tokens, targets = batch()
    mesh = make_mesh(config, torch.device("cpu"))
    model, alone = model_of(name), model_of(name)
    objective = parallelize(model, config, mesh)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(part(tokens, mesh), part(targets, mesh))
        expected = alone.loss(tokens, targets)
    loss.backward()
    expected.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    assert abs(mean / dist.get_world_size() - expected) < 0.01
    found = whole(model, {n: p.grad for n, p in model.named_parameters()})
    for parameter, p in alone.named_parameters():
        assert (found[parameter] - p.grad).norm() < 0.2 * p.grad.norm() + 1e-3, parameter
