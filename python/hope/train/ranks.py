"""What the processes of a run do together: this one alone, or all that torchrun has started."""

import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hope.config import RunConfig
from hope.data import Batch
from hope.model import LanguageModel

T = TypeVar("T")


def launched() -> bool:
    """Whether torchrun, or something that does the same, has started this process."""
    return dist.is_initialized() or ("RANK" in os.environ and "WORLD_SIZE" in os.environ)


def is_first() -> bool:
    """Whether this process writes what only one may write."""
    return not dist.is_initialized() or dist.get_rank() == 0


def agreed(choose: Callable[[], T]) -> T:
    """What the first rank chooses, on all of them."""
    if not dist.is_initialized():
        return choose()
    chosen = [choose() if is_first() else None]
    dist.broadcast_object_list(chosen, src=0)
    return chosen[0]


class Ranks:
    """One process, which does all. `hope.parallel.Grid` is the same for many.

    first: whether this process writes what only one may write. data: how many ranks read rows of
    their own, and which of these this one is. parts: how many ranks a step's tokens are shared by.
    whole: whether this process can use the model without the others.
    """

    first = whole = True
    data, data_rank, parts = 1, 0, 1
    grace = 0.0  # of StopSignals

    def __init__(self, config: RunConfig) -> None:
        config.parallel.data_ranks(1)

    def spread(self, model: LanguageModel, compiled: bool) -> Callable[..., Tensor]:
        """Puts `model` on all ranks; returns the loss of one rank's part of a batch."""
        return torch.compile(model.loss) if compiled else model.loss

    def alone(self, last: bool) -> AbstractContextManager[None]:
        """In which the gradients of a part of a batch stay on the rank, unless it is the last."""
        return nullcontext()

    def part(self, rows: Batch) -> Batch:
        """What this rank reads of the rows that it shares with others."""
        return rows

    def clip(self, model: nn.Module, limit: float) -> Tensor:
        """Limits the norm of the whole model's gradient; returns the norm that it had."""
        return nn.utils.clip_grad_norm_(model.parameters(), limit)

    def mean(self, loss: Tensor) -> Tensor:
        """The mean of what the ranks have."""
        return loss

    def sum(self, *numbers: float) -> tuple[float, ...]:
        """The sums over all parts of a batch."""
        return numbers

    def first_of(self, found: T | None) -> T | None:
        """What the first rank that has found something has found, on all of them."""
        return found

    def stopped(self, received: signal.Signals | None) -> signal.Signals | None:
        """The signal that one of the ranks has received, the same on all of them."""
        return received

    def wait(self) -> None:
        """Until all ranks are here."""


def join(config: RunConfig, device: torch.device) -> Ranks:
    """The ranks of a run. Raises HopeError where `config.parallel` does not fit their number."""
    if not dist.is_initialized():
        return Ranks(config)
    from hope.parallel import Grid  # slow to import, needed only here

    return Grid(config, device)
