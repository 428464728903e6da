"""What a model reads in one step, and in which order.

All samplers cut a stream into rows of `window` tokens and read the rows in a seeded order. A batch
is `batch` rows; of `world` processes each reads its share of them.
"""

import abc
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hope.data.tokens import Tokens, document_bounds
from hope.errors import HopeError
from hope.tokenizers import SEPARATOR

IGNORED = -100  # a target that is not counted


class Batch(NamedTuple):
    """Tokens and what follows each of them, both [B, T] int64; a target of -100 is left out.

    cu_seqlens: None; or, of packed documents (B = 1), where each begins, and T: int32 [N + 1].
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(None if x is None else x.to(device) for x in self))


class Sampler(abc.ABC):
    """Endless batches in a seeded random order, resumable anywhere.

    batch: rows of the batch of all processes together. rank, world: this process reads rows
    rank * batch / world and on of every batch; the processes' rows, in the order of their ranks,
    are those that one process alone would read. Raises HopeError where `tokens` hold no row, or
    `world` does not divide `batch`.
    """

    packed = False

    def __init__(
        self, tokens: Tokens, window: int, batch: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        if len(tokens) <= window:
            raise HopeError(f"{len(tokens)} tokens hold no window of {window} and its targets")
        if not 0 <= rank < world:
            raise HopeError(f"rank must be at least 0 and below world ({world}), not {rank}")
        if batch % world:
            raise HopeError(
                f"batch must be a multiple of the number of processes ({world}), not {batch}"
            )
        self.tokens, self.window, self.batch, self.seed = tokens, window, batch, seed
        share = batch // world
        self._own = (rank * share, (rank + 1) * share)
        self._begin_epoch(0)

    def _begin_epoch(self, epoch: int) -> None:
        # Mixed by SeedSequence, so that epoch e of seed s is not epoch e - 1 of seed s + 1.
        self._starts = self._order(np.random.default_rng([self.seed, epoch]))
        self.epoch, self.cursor = epoch, 0

    @abc.abstractmethod
    def _order(self, random: np.random.Generator) -> np.ndarray:
        """Where the rows of a new epoch begin, in the order in which they are read."""

    @abc.abstractmethod
    def _read(self, starts: np.ndarray) -> Batch:
        """The rows of the present epoch that begin there."""

    def next_batch(self) -> Batch:
        """This process's share of the next batch; it goes on where an epoch ends."""
        parts, row, (first, last) = [], 0, self._own
        while row < self.batch:
            if self.cursor == len(self._starts):
                self._begin_epoch(self.epoch + 1)
            count = min(self.batch - row, len(self._starts) - self.cursor)
            own = self._starts[self.cursor : self.cursor + count]
            own = own[max(0, first - row) : max(0, last - row)]
            if len(own):
                parts.append(self._read(own))
            self.cursor += count
            row += count
        return _joined(parts)

    def state_dict(self) -> dict[str, Any]:
        """Where in the order the next batch begins; the same for every rank."""
        return {"seed": self.seed, "epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seed = state["seed"]
        self._begin_epoch(state["epoch"])
        self.cursor = state["cursor"]


class WindowSampler(Sampler):
    """Windows of the stream, [batch, window]; documents follow each other in a row.

    Every epoch cuts the stream into windows at a new offset and reads each of them once.
    """

    def _order(self, random: np.random.Generator) -> np.ndarray:
        slack = len(self.tokens) - self.window - 1
        offset = int(random.integers(min(slack, self.window - 1) + 1))
        windows = (len(self.tokens) - 1 - offset) // self.window
        return offset + self.window * random.permutation(windows)

    def _read(self, starts: np.ndarray) -> Batch:
        return _windows(self.tokens, starts, self.window)


class PackedSampler(Sampler):
    """Documents side by side in one row [1, batch * window], with cu_seqlens at their bounds.

    Every epoch puts the documents into a new order, cuts what they are then into pieces of
    `window` tokens, wherever that is, and reads each piece once (but for fewer than `window` tokens
    at the end). A document is cut, too, where a piece begins, so that no text is longer than
    `window` and the pieces can be shared out among processes.

    separator: what begins the documents in `tokens`, and the last target of each. cut: the stream
    ends inside a document, whose last token then has no target.
    """

    packed = True

    def __init__(
        self,
        tokens: Tokens,
        window: int,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        *,
        separator: int = SEPARATOR,
        cut: bool = False,
    ) -> None:
        self._documents = _Documents(tokens, separator, cut)
        super().__init__(tokens, window, batch, seed, rank, world)

    def _order(self, random: np.random.Generator) -> np.ndarray:
        self._documents.arrange(random.permutation(self._documents.count))
        return self.window * random.permutation(len(self.tokens) // self.window)

    def _read(self, starts: np.ndarray) -> Batch:
        return self._documents.read(starts, self.window)


class _Documents:
    """The documents of a stream in any order, one after the other."""

    def __init__(self, tokens: Tokens, separator: int, cut: bool) -> None:
        self.tokens, self.separator, self.cut = tokens, separator, cut
        self.bounds = document_bounds(tokens, separator)
        self.count = len(self.bounds) - 1
        self.arrange(np.arange(self.count))

    def arrange(self, order: np.ndarray) -> None:
        """order: the numbers of all documents."""
        begins = self.bounds[order]
        # Where each document ends in the new order, and how far from there it is in `tokens`.
        self._ends = np.cumsum(self.bounds[order + 1] - begins)
        self._begins = np.concatenate([[0], self._ends[:-1]]).astype(np.int64)
        self._shifts = begins - self._begins

    def read(self, starts: np.ndarray, window: int) -> Batch:
        """Packed pieces of `window` tokens that begin there in the new order."""
        place = (starts[:, None] + np.arange(window)).ravel()
        document = np.searchsorted(self._ends, place, side="right")
        position = torch.from_numpy(place + self._shifts[document])
        last = torch.from_numpy(place == self._ends[document] - 1)
        begins = place == self._begins[document]
        begins[::window] = True
        end = len(self.tokens) - 1
        targets = self.tokens[(position + 1).clamp(max=end)].long()
        targets = targets.masked_fill(last, self.separator)
        if self.cut:
            targets = targets.masked_fill(position == end, IGNORED)
        bounds = np.concatenate([np.flatnonzero(begins), [len(place)]]).astype(np.int32)
        tokens = self.tokens[position].long()
        return Batch(tokens[None], targets[None], torch.from_numpy(bounds))


def validation_batches(
    tokens: Tokens,
    window: int,
    batch: int,
    limit: int,
    *,
    packed: bool = False,
    separator: int = SEPARATOR,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """The same rows every time, about `limit` tokens spread evenly; as the samplers give them.

    rank, world: this process reads a share of each batch. All have as many batches: where there are
    fewer rows than processes, one without any reads a row whose targets are all IGNORED.
    """
    documents = _Documents(tokens, separator, cut=False) if packed else None
    rows = (len(tokens) if packed else len(tokens) - 1) // window
    count = min(rows, max(1, limit // window))
    starts = window * np.linspace(0, rows - 1, count).round().astype(np.int64)
    for first in range(0, count, batch):
        some = starts[first : first + batch]
        own = np.array_split(some, world)[rank]
        rows = own if len(own) else some[:1]
        read = documents.read(rows, window) if packed else _windows(tokens, rows, window)
        if not len(own):
            read = read._replace(targets=torch.full_like(read.targets, IGNORED))
        yield read


def _windows(tokens: Tokens, starts: np.ndarray, window: int) -> Batch:
    index = torch.from_numpy(starts)[:, None] + torch.arange(window + 1)
    rows = tokens[index].long()
    return Batch(rows[:, :-1], rows[:, 1:])


def _joined(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    packed = parts[0].cu_seqlens is not None
    tokens, targets = (torch.cat([part[i] for part in parts], dim=int(packed)) for i in (0, 1))
    if not packed:
        return Batch(tokens, targets)
    before, bounds = 0, [torch.zeros(1, dtype=torch.int32)]
    for part in parts:
        bounds.append(part.cu_seqlens[1:] + before)
        before += part.tokens.shape[1]
    return Batch(tokens, targets, torch.cat(bounds))
