"""How well a trained model predicts texts, and how that changes with what it has read of them."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hope.errors import HopeError
from hope.evaluate.aligned import aligned
from hope.evaluate.reader import Reader

_FIRST = 64  # the end of the first range of positions; each further one is twice as far
_RANGES = 40
_ENDS = _FIRST * 2 ** torch.arange(_RANGES - 1)  # of all ranges but the last, which has none


def predict(reader: Reader, texts: Iterable[bytes], length: int | None = None) -> dict[str, Any]:
    """The figures of documents, each read in one pass from a fresh state.

    length: the model forgets after so many predicted tokens; None: it reads whole documents. Either
    way every token is predicted once, the separator that ends a document too: its nats count, while
    only bytes are divided by (as `hope train` validates).

    Returns documents, tokens, bytes, nats, bits_per_byte (of code), perplexity (of a token), and
    positions: tokens, bytes, nats and bits_per_byte of those that had `from` up to `to` - 1 tokens
    of the document (or since the model has forgotten) before them.
    """
    if length is not None and length < 1:
        raise HopeError(f"length must be at least 1, not {length}")
    tally = torch.zeros(3, _RANGES, dtype=torch.float64)  # tokens, bytes, nats
    byte_counts = reader.tokenizer.byte_counts
    documents = _Counted(texts)
    pieces = _pieces(reader, documents, length)
    while batch := list(itertools.islice(pieces, reader.batch)):
        for part in reader.read(batch):
            places = part.start + torch.arange(part.log_p.shape[1])
            where = torch.bucketize(places - 1, _ENDS, right=True).expand_as(part.log_p)
            sizes = torch.zeros_like(where)
            for row, text in enumerate(part.rows.tolist()):
                here = batch[text][part.start : part.start + len(places)]
                sizes[row, : len(here)] = byte_counts[here]
            here = part.inside
            for kind, values in enumerate((torch.ones_like(sizes), sizes, -part.log_p)):
                tally[kind].index_add_(0, where[here], values[here].double())
    if not documents.count:
        raise HopeError("texts must hold at least one document, not none")
    return {
        "length": length,
        "documents": documents.count,
        **_figures(tally.sum(1)),
        "positions": [
            {"from": start, "to": stop, **_figures(tally[:, i])}
            for i, (start, stop) in enumerate(itertools.pairwise([0, *_ENDS.tolist(), None]))
            if tally[0, i]
        ],
    }


class _Counted:
    """Texts, and how many of them have been taken."""

    def __init__(self, texts: Iterable[bytes]) -> None:
        self.texts, self.count = texts, 0

    def __iter__(self) -> Iterator[bytes]:
        for text in self.texts:
            self.count += 1
            yield text


def _pieces(reader: Reader, texts: Iterable[bytes], length: int | None) -> Iterator[list[int]]:
    """What is read from a fresh state: each token but the first is predicted, and only once."""
    separator = [reader.tokenizer.separator]
    for text in texts:
        tokens = separator + reader.encode(text) + separator
        for start in range(0, len(tokens) - 1, length or len(tokens)):
            yield tokens[start : start + length + 1 if length else None]


def _figures(tally: Tensor) -> dict[str, Any]:
    tokens, size, nats = tally.tolist()
    return {
        "tokens": int(tokens),
        "bytes": int(size),
        "nats": nats,
        # The only token here may be the separator at the end of a document.
        "bits_per_byte": nats / size / math.log(2) if size else None,
        "perplexity": math.exp(nats / tokens),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """A line for each of the figures of `predict`, and one for each range of positions."""
    names = [f"{r['length']:,}" if r["length"] else "whole texts" for r in results]
    rows = [("memory of", "documents", "tokens", "bytes", "bits/byte", "perplexity")]
    rows += [
        (
            name,
            *(f"{result[key]:,}" for key in ("documents", "tokens", "bytes")),
            _shown(result["bits_per_byte"]),
            f"{result['perplexity']:.3f}",
        )
        for name, result in zip(names, results, strict=True)
    ]
    by_position: dict[tuple[int, int | None], dict[str, str]] = {}
    for name, result in zip(names, results, strict=True):
        for place in result["positions"]:
            cells = by_position.setdefault((place["from"], place["to"]), {})
            cells[name] = _shown(place["bits_per_byte"])
    positions = [("bits/byte after", *names)]
    for (start, stop), cells in sorted(by_position.items(), key=lambda item: item[0][0]):
        label = f"{start:,} to {stop - 1:,} tokens" if stop else f"{start:,} tokens and more"
        positions.append((label, *(cells.get(name, "") for name in names)))
    return f"{aligned(rows)}\n\n{aligned(positions)}"


def _shown(bits: float | None) -> str:
    return "-" if bits is None else f"{bits:.4f}"
