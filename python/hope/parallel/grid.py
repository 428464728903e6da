"""What the processes of a run do together, on a grid of them."""

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hope.config import RunConfig
from hope.config.check import require
from hope.data import Batch
from hope.model import LanguageModel
from hope.parallel.mesh import columns, make_mesh
from hope.parallel.tensor import check_tensor
from hope.parallel.wrap import clip_gradients, parallelize
from hope.train.ranks import Ranks, is_first

T = TypeVar("T")


class Grid(Ranks):
    """All processes of the default group, as `config.parallel` says. Raises HopeError.

    Ranks that share layers read the same, and do the same things to it.
    """

    grace = 1.0

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        train, parallel = config.train, config.parallel
        data = parallel.data_ranks(dist.get_world_size())
        rows = train.batch // train.accumulate
        require(rows % data == 0, "train.batch / train.accumulate", _multiple(data, "data"), rows)
        tokens, parts = train.sequence, parallel.sequence
        require(tokens % parts == 0, "train.sequence", _multiple(parts, "sequence"), tokens)
        check_tensor(config.model, parallel.tensor)
        alike = parallel.data == "ddp" and parallel.tensor == parts == 1
        require(
            alike or not train.compile,
            "train.compile",
            "false, but for ranks that differ in their data alone, with parallel.data=ddp",
            train.compile,
        )
        self.mesh = make_mesh(parallel, device)
        self.data, self.data_rank = data, self.mesh.get_local_rank("data")
        self.parts = data * parts
        self.whole = alike
        self.first = is_first()

    def spread(self, model: LanguageModel, compiled: bool) -> Callable[..., Tensor]:
        self.objective = parallelize(model, self.config.parallel, self.mesh, compiled=compiled)
        return self.objective

    def alone(self, last: bool) -> AbstractContextManager[None]:
        # fully_shard's ranks share gradients every time: they have no room for whole ones.
        if last or not isinstance(self.objective, DistributedDataParallel):
            return nullcontext()
        return self.objective.no_sync()

    def part(self, rows: Batch) -> Batch:
        tokens, targets, cu_seqlens = rows
        return Batch(columns(tokens, self.mesh), columns(targets, self.mesh), cu_seqlens)

    def clip(self, model: nn.Module, limit: float) -> Tensor:
        return clip_gradients(model.parameters(), limit)

    def mean(self, loss: Tensor) -> Tensor:
        # Tensor ranks have the same loss: it does not matter how often each is counted.
        total = loss.detach().clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    def sum(self, *numbers: float) -> tuple[float, ...]:
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return tuple((total / self.mesh["tensor"].size()).tolist())

    def first_of(self, found: T | None) -> T | None:
        everyones: list[T | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, found)
        return next((one for one in everyones if one is not None), None)

    def stopped(self, received: signal.Signals | None) -> signal.Signals | None:
        number = torch.tensor(0 if received is None else int(received), device=self.device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return signal.Signals(int(number)) if number > 0 else None

    def wait(self) -> None:
        dist.barrier()


def _multiple(ranks: int, of: str) -> str:
    return f"a multiple of the {ranks} {of} ranks"
