"""A corpus: documents as tokens, in two streams, one to train on and one to judge by."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hope.config import DataConfig, TrainConfig
from hope.data.documents import VALIDATION_FRACTION, Document, Documents, StandardLibrary
from hope.data.sampler import PackedSampler, Sampler, WindowSampler
from hope.data.shards import is_shards, load_shards, shards_tokenizer
from hope.data.tokens import Tokens, stream
from hope.errors import HopeError
from hope.tokenizers import BYTES, Tokenizer, open_tokenizer


@dataclass(frozen=True)
class Corpus:
    """Training and validation tokens, and a sentence that says where they come from.

    train, validation: 1-D int16 or int32 in memory, or mapped from shards. cut: the training tokens
    end inside a document.
    """

    train: Tokens
    validation: Tokens
    description: str
    tokenizer: Tokenizer = BYTES
    cut: bool = False

    @cached_property  # a run writes it into every checkpoint
    def fingerprint(self) -> str:
        """A hash of all tokens, which tells two corpora apart."""
        digest = hashlib.sha256()
        for tokens in (self.train, self.validation):
            digest.update(len(tokens).to_bytes(8, "big"))
            digest.update(
                memoryview(tokens.contiguous().numpy())
                if isinstance(tokens, Tensor)
                else tokens.fingerprint.encode()
            )
        if self.tokenizer.fingerprint != BYTES.fingerprint:
            digest.update(self.tokenizer.fingerprint.encode())
        return digest.hexdigest()


def load_corpus(data: DataConfig | Sequence[str] = (), window: int = 256) -> Corpus:
    """Reads, splits and tokenizes what `data` (or its paths alone) names.

    No paths: the source of the running interpreter's standard library. Directories of shards are
    mapped; all else is read into memory, a document at a time.

    A document goes to validation by the hash of its name (about 5 % do). Where that leaves a side
    without one window of `window` + 1 tokens, as with a single file, the last 5 % of the joined
    text are the validation side instead (of shards, both sides are joined). Raises HopeError for
    missing, empty, binary or broken files, and for less text than two windows.
    """
    if not isinstance(data, DataConfig):
        data = DataConfig(paths=tuple(data))
    tokenizer = corpus_tokenizer(data)
    if _names_shards(data):
        train, validation, source = load_shards([Path(path) for path in data.paths])
        by, parts = "document", None
    else:
        documents = open_documents(data)
        parts = list(tokenized(documents, tokenizer))
        train = _in_memory((tokens for held, tokens in parts if not held), tokenizer)
        validation = _in_memory((tokens for held, tokens in parts if held), tokenizer)
        source, by = documents.description, documents.unit
    how, cut = f"split by {by}", False
    if min(len(train), len(validation)) <= window:
        if parts is None:
            tokens = train + validation
        else:
            tokens = _in_memory((tokens for _, tokens in parts), tokenizer)
        at = len(tokens) - max(window + 1, round(VALIDATION_FRACTION * len(tokens)))
        if at <= window:
            raise HopeError(
                f"too little text: {len(tokens):,} {tokenizer.unit} in {source}; to train and "
                f"validate with sequences of {window} needs at least {2 * (window + 1):,}"
            )
        cut = int(tokens[torch.tensor([at])]) != tokenizer.separator
        train, validation = _part(tokens, 0, at), _part(tokens, at, len(tokens))
        how = "validation: the end of the text"
    sizes = f"{len(train):,} training and {len(validation):,} validation {tokenizer.unit}"
    return Corpus(train, validation, f"{source}: {sizes} ({how})", tokenizer, cut)


def corpus_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer that `load_corpus` uses, without reading the text: that of shards, if any.

    Raises HopeError where paths disagree about it, or data.tokenizer is another.
    """
    tokenizer = open_tokenizer(data.tokenizer)
    if not _names_shards(data):
        return tokenizer
    found = [(path, shards_tokenizer(Path(path))) for path in data.paths]
    first, of_shards = found[0]
    for path, other in found[1:]:
        if other.fingerprint != of_shards.fingerprint:
            raise HopeError(f"the shards in {first} and {path} were made with other tokenizers")
    if data.tokenizer is not None and tokenizer.fingerprint != of_shards.fingerprint:
        raise HopeError(
            f"data.tokenizer is {data.tokenizer}, but the shards in {first} were made with "
            f"{of_shards.name}; leave it out"
        )
    return of_shards


def open_documents(data: DataConfig) -> Documents | StandardLibrary:
    """The documents that `data` names, which must be no shards; none named: Python's own source."""
    for path in data.paths:
        if is_shards(Path(path)):
            raise HopeError(f"data.paths must name text here, not shards: {path}")
    return Documents(data.paths, data.field) if data.paths else StandardLibrary()


def _names_shards(data: DataConfig) -> bool:
    are = [is_shards(Path(path)) for path in data.paths]
    if any(are) and not all(are):
        raise HopeError(
            f"data.paths must all be shards or none, but {data.paths[are.index(True)]} is a "
            f"directory of shards and {data.paths[are.index(False)]} is not"
        )
    return any(are)


def tokenized(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[tuple[bool, np.ndarray]]:
    """For each document whether it is for validation, and its tokens; few are held at a time."""
    sides: deque[bool] = deque()

    def texts() -> Iterator[bytes]:
        for document in documents:
            sides.append(document.is_validation)
            yield document.text

    for tokens in tokenizer.encode_all(texts()):
        yield sides.popleft(), tokens


def encode(documents: Iterable[Document], tokenizer: Tokenizer = BYTES) -> Tensor:
    """The documents as one stream of tokens in memory, a separator before each."""
    return _in_memory((tokens for _, tokens in tokenized(documents, tokenizer)), tokenizer)


def _in_memory(parts: Iterable[np.ndarray], tokenizer: Tokenizer) -> Tensor:
    return stream(parts, tokenizer.vocab_size, tokenizer.separator)


def _part(tokens: Tokens, start: int, stop: int) -> Tokens:
    return tokens[start:stop] if isinstance(tokens, Tensor) else tokens.part(start, stop)


def training_sampler(
    corpus: Corpus, train: TrainConfig, *, packed: bool = False, rank: int = 0, world: int = 1
) -> Sampler:
    """Batches of the training tokens: windows, or packed documents (hope.data.sampler).

    Each is one of the `train.accumulate` parts of what a step reads.
    """
    rows = train.batch // train.accumulate
    shape = (corpus.train, train.sequence, rows, train.seed, rank, world)
    if packed:
        return PackedSampler(*shape, separator=corpus.tokenizer.separator, cut=corpus.cut)
    return WindowSampler(*shape)
