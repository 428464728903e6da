"""Streams of tokens, in memory or mapped from files, and where their documents begin.

A stream is the documents' tokens one after the other, a separator before each. It may be larger
than the memory: then it is `MappedTokens`, which can be indexed as a tensor can.
"""

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenShard:
    """A part of a stream: its tokens, and where documents begin in it (rising, int64)."""

    tokens: np.ndarray
    starts: np.ndarray

    def part(self, start: int, stop: int) -> "TokenShard":
        """Its tokens from `start` to before `stop`."""
        first, last = np.searchsorted(self.starts, (start, stop))
        return TokenShard(self.tokens[start:stop], self.starts[first:last] - start)


class MappedTokens:
    """The tokens of shards, one shard after the other, read from their files where needed.

    Like a 1-D tensor it has a length, and an int64 tensor of positions, of any shape, as an index,
    which gives the tokens there as int64. fingerprint: stands for all of them.
    """

    def __init__(self, shards: Sequence[TokenShard], fingerprint: str) -> None:
        self.shards, self.fingerprint = list(shards), fingerprint
        # Where each shard begins, and the last ends.
        sizes = (len(shard.tokens) for shard in self.shards)
        self._bounds = list(itertools.accumulate(sizes, initial=0))

    def __len__(self) -> int:
        return self._bounds[-1]

    def __getitem__(self, positions: Tensor) -> Tensor:
        where = positions.numpy().ravel()
        if where.size and not 0 <= where.min() <= where.max() < len(self):
            raise IndexError(
                f"positions {where.min()} to {where.max()} of a stream of {len(self)} tokens"
            )
        found = np.empty(where.shape, np.int64)
        # Rows and documents are runs of positions, and a run is one copy from each of its shards.
        ends = [*(np.flatnonzero(np.diff(where) != 1) + 1).tolist(), where.size]
        here = 0
        for end in ends:
            while here < end:
                start = int(where[here])
                number = bisect.bisect_right(self._bounds, start) - 1
                start -= self._bounds[number]
                tokens = self.shards[number].tokens[start : start + end - here]
                found[here : here + len(tokens)] = tokens
                here += len(tokens)
        return torch.from_numpy(found).view(positions.shape)

    def part(self, start: int, stop: int) -> "MappedTokens":
        """The stream from token `start` to before token `stop`; nothing is read."""
        shards = [
            shard.part(max(0, start - base), min(len(shard.tokens), stop - base))
            for shard, base in zip(self.shards, self._bounds[:-1], strict=True)
            if base < stop and start < base + len(shard.tokens)
        ]
        return MappedTokens(shards, f"{self.fingerprint}[{start}:{stop}]")

    def __add__(self, other: "MappedTokens") -> "MappedTokens":
        fingerprint = f"{self.fingerprint}+{other.fingerprint}"
        return MappedTokens(self.shards + other.shards, fingerprint)

    def starts(self) -> np.ndarray:
        """Where documents begin, rising, int64."""
        bases = zip(self.shards, self._bounds[:-1], strict=True)
        return np.concatenate(
            [np.empty(0, np.int64), *(shard.starts + base for shard, base in bases)]
        )


Tokens = Tensor | MappedTokens


def document_bounds(tokens: Tokens, separator: int) -> np.ndarray:
    """Where each document begins, and where the last ends: int64 [documents + 1].

    A stream that begins inside a document begins with what is left of it.
    """
    if isinstance(tokens, MappedTokens):
        starts = tokens.starts()
    else:
        starts = (tokens == separator).nonzero()[:, 0].numpy()
    before = [0] if len(starts) == 0 or starts[0] > 0 else []
    return np.concatenate([np.array(before, np.int64), starts, [len(tokens)]])


def stream(parts: Iterable[np.ndarray], vocab_size: int, separator: int) -> Tensor:
    """Documents as one stream in memory: 1-D, int16 where that holds the vocabulary, or int32."""
    kind = np.int16 if vocab_size <= 2**15 else np.int32
    joined = [part for tokens in parts for part in (np.array([separator], kind), tokens)]
    return torch.from_numpy(np.concatenate([np.empty(0, kind), *joined], dtype=kind))
