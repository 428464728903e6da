"""What training needs in memory on each rank, computed without allocating it.

Weights are float32, their gradients too, and AdamW keeps two moments: 4 + 4 + 8 = 16 bytes per
parameter. What the backward needs of the activations is found by running the model on fake tensors,
which have shapes and no data, and adding up what autograd keeps. Nothing else is counted: the
kernels' working space, the allocator's reserve (often a tenth), and torch itself.
"""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hope.config import ModelConfig, ParallelConfig, RunConfig
from hope.model import LanguageModel
from hope.parallel.tensor import check_tensor

_FLOAT = 4


@dataclass(frozen=True)
class Activations:
    """Bytes that one rank keeps for the backward of one step.

    layers: of all blocks together, without the memories. memories: the states and checkpoints that
    the kernels of the memories keep. head: embedding, last norm, logits and loss.
    """

    layers: int
    memories: int
    head: int

    @property
    def total(self) -> int:
        return self.layers + self.memories + self.head


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that needs the most, and the numbers they are computed of.

    parameters: in the whole model. held: of these, on the rank. gathered: the parameters that
    fully_shard joins for the largest block and the head while they compute, and their gradients.
    rows, tokens: what the rank computes at once.
    """

    parameters: int
    held: int
    rows: int
    tokens: int
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: Activations

    @property
    def total(self) -> int:
        static = self.weights + self.gradients + self.optimizer + self.gathered
        return static + self.activations.total


def training_memory(
    run: RunConfig, parallel: ParallelConfig, world: int = 1, rows: int | None = None
) -> Memory:
    """What a step of `run` needs on a grid of `world` processes. Raises HopeError as a run would.

    rows: sequences that a rank computes at once; None: its share of train.batch, by
    train.accumulate.
    Of sequence ranks it is the first's, which has no state of a rank before: attention, which keeps
    all keys, needs more on later ones.
    """
    train, data = run.train, parallel.data_ranks(world)
    check_tensor(run.model, parallel.tensor)
    local = of_one_tensor_rank(run.model, parallel.tensor)
    with torch.device("meta"):
        model, all_of_it = LanguageModel(local), LanguageModel(run.model)
    sharded = parallel.data == "fsdp" and data > 1
    held = sum(_rows_of(p, data) if sharded else p.numel() for p in model.parameters())
    pending = sum(_pending(model, run)) // (data if sharded else 1)
    in_blocks = max(map(_count, model.blocks))
    head = _count(model) - sum(map(_count, model.blocks))
    # Rows and tokens need not come out even here, so that presets can be asked for any world.
    if rows is None:
        rows = -(-train.batch // (train.accumulate * data))
    tokens = -(-train.sequence // parallel.sequence)
    return Memory(
        parameters=_count(all_of_it),
        held=held,
        rows=rows,
        tokens=tokens,
        weights=_FLOAT * held,
        gradients=_FLOAT * held,
        optimizer=2 * _FLOAT * held + _FLOAT * pending,
        gathered=2 * _FLOAT * (in_blocks + head) if sharded else 0,
        activations=activations(
            local, rows, tokens, train.dtype, again=train.checkpoint_activations
        ),
    )


def of_one_tensor_rank(config: ModelConfig, ranks: int) -> ModelConfig:
    """A model of the size of what one of `ranks` tensor ranks holds of `config`."""
    mixer = replace(config.mixer, heads=config.mixer.heads // ranks)
    if config.cms is not None and config.cms.updates:
        return replace(config, mixer=mixer)
    return replace(config, mixer=mixer, mlp_ratio=config.mlp_dim / ranks / config.dim)


def activations(
    config: ModelConfig, rows: int, tokens: int, dtype: str, *, again: bool = False
) -> Activations:
    """What autograd keeps of a loss of [rows, tokens]: one block's share times the blocks.

    again: of every block only its input, and all of the one that is being computed again.
    """
    one, two = (
        kept_bytes(replace(config, layers=n), rows, tokens, dtype, fake=True) for n in (1, 2)
    )
    each = {name: two[name] - one[name] for name in one}
    inputs = _FLOAT * rows * tokens * config.dim * config.layers if again else 0
    whole = 1 if again else config.layers
    return Activations(
        layers=each["other"] * whole + inputs,
        memories=each["memories"] * whole,
        head=one["other"] - each["other"],
    )


@functools.lru_cache
def kept_bytes(
    config: ModelConfig, rows: int, tokens: int, dtype: str, *, fake: bool
) -> dict[str, int]:
    """The bytes of all storages that autograd keeps of a loss, the weights' aside.

    "memories": what the operators of hope_ext return besides their answer; "other": the rest.
    fake: on tensors without data; otherwise in earnest, on the CPU.
    """
    with FakeTensorMode() if fake else contextlib.nullcontext(), _Returned() as returned:
        model = LanguageModel(config)
        weights = {_storage(p)._cdata for p in model.parameters()}
        kept: dict[int, Any] = {}

        def keep(x: Tensor) -> Tensor:
            kept[_storage(x)._cdata] = _storage(x)
            return x

        batch = torch.zeros(rows, tokens, dtype=torch.int64)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast:
            loss = model.loss(batch, batch)
    del loss
    result: dict[str, int] = defaultdict(int, memories=0, other=0)
    for key, storage in kept.items():
        if key not in weights:
            result["memories" if key in returned.storages else "other"] += storage.nbytes()
    return dict(result)


class _Returned(TorchDispatchMode):
    """While open: the storages of what hope_ext's operators return after their first result."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "hope" and isinstance(result, (tuple, list)):
            for x in pytree.tree_leaves(result[1:]):
                self.storages[_storage(x)._cdata] = _storage(x)
        return result


def _storage(x: Tensor) -> Any:
    return x.untyped_storage()


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _rows_of(parameter: Tensor, ranks: int) -> int:
    """How many numbers the first of the ranks has of a parameter: fully_shard cuts along rows."""
    return -(-parameter.shape[0] // ranks) * parameter.shape[1:].numel()


def _pending(model: LanguageModel, run: RunConfig) -> Iterator[int]:
    """The numbers that MultiFrequency collects for MLPs which move once in several steps."""
    for block in model.blocks:
        if block.cms is not None and run.train.level_periods:
            for level, period in zip(block.cms.levels, run.train.level_periods, strict=True):
                yield _count(level) if period > 1 else 0
