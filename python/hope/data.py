"""Byte-level text: where it comes from, how it is split, and in which order it is read.

A corpus is a stream of tokens: the bytes of the documents, each preceded by SEPARATOR, which so is
also what a text starts with when it is generated.
"""

import glob
import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hope.errors import HopeError

SEPARATOR = 256
VOCAB_SIZE = 257  # tokens in use; a model's vocab_size may be larger
VALIDATION_FRACTION = 0.05
_GLOB_CHARACTERS = "*?["


@dataclass(frozen=True)
class Document:
    """A text and the name that decides on which side of the split it falls."""

    name: str
    text: bytes


@dataclass(frozen=True)
class Corpus:
    """Training and validation tokens (1-D int16), and a sentence that says where they come from."""

    train: Tensor
    validation: Tensor
    description: str

    @property
    def fingerprint(self) -> str:
        """A hash of all tokens, which tells two corpora apart."""
        digest = hashlib.sha256()
        for tokens in (self.train, self.validation):
            digest.update(len(tokens).to_bytes(8, "big") + tokens.numpy().tobytes())
        return digest.hexdigest()


def load_corpus(patterns: Sequence[str] = (), window: int = 256) -> Corpus:
    """Reads and splits the text that `patterns` name (files, directories, globs).

    No patterns: the source of the running interpreter's standard library.

    A document goes to validation by the hash of its name (about 5 % do). Where that leaves a side
    without one window of `window` + 1 tokens, as with a single file, the last 5 % of the joined
    text are the validation side instead. Raises HopeError for missing, empty or binary files, and
    for less text than two windows.
    """
    documents, source = _documents(patterns) if patterns else _standard_library()
    sides: dict[bool, list[Document]] = {True: [], False: []}
    for document in documents:
        sides[_is_validation(document.name)].append(document)
    train, validation = encode(sides[False]), encode(sides[True])
    how = "split by file"
    if min(len(train), len(validation)) <= window:
        tokens = encode(documents)
        cut = len(tokens) - max(window + 1, round(VALIDATION_FRACTION * len(tokens)))
        if cut <= window:
            raise HopeError(
                f"too little text: {len(tokens):,} bytes in {source}; to train and validate with "
                f"sequences of {window} needs at least {2 * (window + 1):,}"
            )
        train, validation = tokens[:cut], tokens[cut:]
        how = "validation: the end of the text"
    sizes = f"{len(train):,} training and {len(validation):,} validation bytes"
    return Corpus(train, validation, f"{source}: {sizes} ({how})")


def encode(documents: Sequence[Document]) -> Tensor:
    """The documents as one stream of tokens (1-D int16), a SEPARATOR before each."""
    parts = []
    for document in documents:
        parts += [np.array([SEPARATOR], np.int16), np.frombuffer(document.text, np.uint8)]
    return (
        torch.from_numpy(np.concatenate(parts).astype(np.int16))
        if parts
        else torch.empty(0).short()
    )


def _is_validation(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < VALIDATION_FRACTION * 2**64


def _standard_library() -> tuple[list[Document], str]:
    """The Python source files of the running interpreter's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages"}.isdisjoint(path.relative_to(root).parts):
            text = path.read_bytes()
            if (
                text and _why_not_text(text) is None
            ):  # its tests hold files in odd encodings on purpose
                documents.append(Document(path.relative_to(root).as_posix(), text))
    if not documents:
        raise HopeError(f"no source of Python's standard library in {root}; name files with --data")
    return documents, f"Python's standard library ({len(documents):,} files in {root})"


def _documents(patterns: Sequence[str]) -> tuple[list[Document], str]:
    """The documents of files (which must be text), directories and globs (others are skipped)."""
    documents: dict[Path, Document] = {}
    skipped = 0
    for pattern in patterns:
        path = Path(pattern)
        if path.is_file():
            documents[path.resolve()] = Document(path.name, _read_text(path))
            continue
        names = _files_in(path) if path.is_dir() else _files_matching(pattern)
        for name, found in names:
            text = _read(found)
            if text and _why_not_text(text) is None:
                documents[found.resolve()] = Document(name, text)
            else:
                skipped += 1
    named = ", ".join(patterns[:3]) + (", ..." if len(patterns) > 3 else "")
    if not documents:
        raise HopeError(
            f"no text in {named}: all {skipped} files there are empty or not UTF-8 text"
        )
    plural = "file" if len(documents) == 1 else "files"
    left_out = f", {skipped} empty or not text left out" if skipped else ""
    return list(documents.values()), f"{named} ({len(documents):,} {plural}{left_out})"


def _files_in(root: Path) -> list[tuple[str, Path]]:
    """All files below a directory with their relative names, except below hidden names."""
    relative = (path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file())
    visible = [path for path in relative if not any(part.startswith(".") for part in path.parts)]
    if not visible:
        raise HopeError(f"no files in the directory {root}")
    return [(path.as_posix(), root / path) for path in visible]


def _files_matching(pattern: str) -> list[tuple[str, Path]]:
    if not any(character in pattern for character in _GLOB_CHARACTERS):
        raise HopeError(f"no such file or directory: {pattern}")
    found = [(name, Path(name)) for name in sorted(glob.glob(pattern, recursive=True))]
    files = [(name, path) for name, path in found if path.is_file()]
    if not files:
        raise HopeError(f"no file matches {pattern}")
    return files


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise HopeError(f"cannot read {path}: {error.strerror}") from error


def _read_text(path: Path) -> bytes:
    text = _read(path)
    if not text:
        raise HopeError(f"{path} is empty")
    reason = _why_not_text(text)
    if reason is not None:
        raise HopeError(f"{path} is not UTF-8 text ({reason})")
    return text


def _why_not_text(text: bytes) -> str | None:
    zero = text.find(0)
    if zero >= 0:
        return f"a zero byte at offset {zero}"
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return f"byte 0x{text[error.start]:02x} at offset {error.start}"
    return None


class WindowSampler:
    """Endless batches of training windows in a seeded random order, resumable anywhere.

    Every epoch cuts the stream into windows at a new offset and reads each of them once.
    """

    def __init__(self, tokens: Tensor, window: int, batch: int, seed: int) -> None:
        if len(tokens) <= window:
            raise HopeError(f"{len(tokens)} tokens hold no window of {window} and its targets")
        self.tokens, self.window, self.batch, self.seed = tokens, window, batch, seed
        self._begin_epoch(0)

    def _begin_epoch(self, epoch: int) -> None:
        # Mixed by SeedSequence, so that epoch e of seed s is not epoch e - 1 of seed s + 1.
        random = np.random.default_rng([self.seed, epoch])
        slack = len(self.tokens) - self.window - 1
        offset = int(random.integers(min(slack, self.window - 1) + 1))
        windows = (len(self.tokens) - 1 - offset) // self.window
        self.epoch, self.cursor = epoch, 0
        self._starts = offset + self.window * random.permutation(windows)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both [batch, window] int64; targets are the next tokens."""
        starts = []
        while len(starts) < self.batch:
            if self.cursor == len(self._starts):
                self._begin_epoch(self.epoch + 1)
            starts.append(self._starts[self.cursor])
            self.cursor += 1
        return _windows(self.tokens, np.array(starts), self.window)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seed = state["seed"]
        self._begin_epoch(state["epoch"])
        self.cursor = state["cursor"]


def validation_batches(
    tokens: Tensor, window: int, batch: int, limit: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same windows every time, about `limit` tokens spread evenly; as in next_batch."""
    windows = (len(tokens) - 1) // window
    count = min(windows, max(1, limit // window))
    starts = window * np.linspace(0, windows - 1, count).round().astype(np.int64)
    for first in range(0, count, batch):
        yield _windows(tokens, starts[first : first + batch], window)


def _windows(tokens: Tensor, starts: np.ndarray, window: int) -> tuple[Tensor, Tensor]:
    index = torch.from_numpy(starts)[:, None] + torch.arange(window + 1)
    rows = tokens[index].long()
    return rows[:, :-1], rows[:, 1:]
