"""Tokens on disk, so that a corpus may be larger than the memory.

A directory of shards has, for each side ("train", "validation"), files `<side>-00000.bin`, ... of
tokens (uint16, or uint32 for a vocabulary that needs it) in the machine's byte order, and with each
a `.starts` of int64, where in it documents begin. A shard holds whole documents. `index.json` lists
the files; a `tokenizer.json` beside it is what the tokens were made with, without one: bytes.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hope.data.tokens import MappedTokens, TokenShard
from hope.errors import HopeError
from hope.files import atomic_directory
from hope.tokenizers import Tokenizer, load_tokenizer

_INDEX = "index.json"
_FORMAT = "hope-shards-1"
_SIDES = ("train", "validation")
SHARD_TOKENS = 1 << 28  # half a GiB of uint16


def is_shards(path: Path) -> bool:
    """Whether `path` is a directory that `write_shards` wrote."""
    try:
        return json.loads((path / _INDEX).read_text())["format"] == _FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_shards(
    documents: Iterable[tuple[bool, np.ndarray]],
    tokenizer: Tokenizer,
    out: Path,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Writes documents (whether each is for validation, and its tokens) as shards, or nothing.

    shard_tokens: a shard ends with the document that fills it. Returns the index: for each side its
    "tokens", "documents" and "files". Raises HopeError where `out` is not new or empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HopeError(f"{out} is not empty; shards need a new directory")
    kind = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    with atomic_directory(out) as directory:
        with ExitStack() as files:
            sides = [
                files.enter_context(_side(directory, name, kind, tokenizer.separator, shard_tokens))
                for name in _SIDES
            ]
            for held, tokens in documents:
                sides[held].add(tokens)
        index = {
            "format": _FORMAT,
            "dtype": kind.name,
            "byteorder": sys.byteorder,
            "tokenizer": tokenizer.fingerprint,
            **{name: side.summary() for name, side in zip(_SIDES, sides, strict=True)},
        }
        tokenizer.save(directory)
        (directory / _INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return index


@contextmanager
def _side(*arguments: Any) -> Iterator["_SideWriter"]:
    side = _SideWriter(*arguments)
    try:
        yield side
    finally:
        side.close()


class _SideWriter:
    """One side's files; documents are appended."""

    def __init__(
        self, directory: Path, side: str, kind: np.dtype, separator: int, limit: int
    ) -> None:
        self._directory, self._side, self._limit = directory, side, limit
        self._separator = np.array([separator], kind)
        self._shards: list[dict[str, Any]] = []
        self._files: list[Any] = []
        self._digest = hashlib.sha256()

    def add(self, tokens: np.ndarray) -> None:
        if not self._shards or self._shards[-1]["tokens"] >= self._limit:
            self._next()
        shard, (data, starts) = self._shards[-1], self._files
        starts.write(np.int64(shard["tokens"]).tobytes())
        content = np.concatenate([self._separator, tokens], dtype=self._separator.dtype).tobytes()
        data.write(content)
        self._digest.update(content)
        shard["tokens"] += 1 + len(tokens)
        shard["documents"] += 1

    def _next(self) -> None:
        self.close()
        name = f"{self._side}-{len(self._shards):05d}"
        self._files = [(self._directory / (name + end)).open("wb") for end in (".bin", ".starts")]
        self._shards.append({"name": name, "tokens": 0, "documents": 0})

    def close(self) -> None:
        for file in self._files:
            file.close()

    def summary(self) -> dict[str, Any]:
        totals = {
            name: sum(shard[name] for shard in self._shards) for name in ("tokens", "documents")
        }
        return {**totals, "fingerprint": self._digest.hexdigest(), "files": self._shards}


def shards_tokenizer(directory: Path) -> Tokenizer:
    """What a directory of shards was made with; HopeError where another tokenizer is there."""
    tokenizer = load_tokenizer(directory)
    made_with = json.loads((directory / _INDEX).read_text()).get("tokenizer")
    if tokenizer.fingerprint != made_with:
        raise HopeError(
            f"{directory} is damaged: its tokens were not made with {tokenizer.name}, which its "
            "tokenizer.json (none: bytes) says"
        )
    return tokenizer


def load_shards(directories: Sequence[Path]) -> tuple[MappedTokens, MappedTokens, str]:
    """The training and validation tokens of directories, one after the other, and a description.

    Nothing but the index is read; HopeError where it, or the size of a file, is wrong.
    """
    sides = [MappedTokens([], ""), MappedTokens([], "")]
    documents = 0
    for directory in directories:
        try:
            index = json.loads((directory / _INDEX).read_text())
            if index["byteorder"] != sys.byteorder:
                raise HopeError(
                    f"the shards in {directory} were written on a machine with another byte order "
                    f"({index['byteorder']}); write them anew on this one"
                )
            for i, name in enumerate(_SIDES):
                side, kind = index[name], np.dtype(index["dtype"])
                shards = [_map(directory, shard, kind) for shard in side["files"]]
                sides[i] += MappedTokens(shards, side["fingerprint"])
                documents += side["documents"]
        except OSError as error:
            raise HopeError(f"cannot read {error.filename}: {error.strerror}") from error
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise HopeError(f"{directory / _INDEX} is damaged: {error!r}") from error
    named = ", ".join(map(str, directories[:3])) + (", ..." if len(directories) > 3 else "")
    count = sum(len(side.shards) for side in sides)
    return *sides, f"{named} (shards: {count:,}, documents: {documents:,})"


def _map(directory: Path, shard: dict[str, Any], kind: np.dtype) -> TokenShard:
    mapped = []
    for end, each, count in ((".bin", kind, "tokens"), (".starts", np.dtype("int64"), "documents")):
        path, expected = directory / (shard["name"] + end), each.itemsize * shard[count]
        if (size := path.stat().st_size) != expected:
            raise HopeError(f"{path} is damaged: it must have {expected:,} bytes, not {size:,}")
        mapped.append(np.asarray(np.memmap(path, each, mode="r")))  # slices are cheaper so
    return TokenShard(*mapped)
