"""From text to tokens and back: bytes, or the vocabulary of a `tokenizer.json`.

Every token stands for certain bytes, the same wherever it is: a text's tokens, put one after the
other, are the text. So text can be written token by token, and the bytes of any stretch of tokens
can be counted. Tokenizers that lose or add something on the way are refused.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hope.errors import HopeError
from hope.extras import need

SEPARATOR = 256
VOCAB_SIZE = 257  # tokens in use; a model's vocab_size may be larger

_FILE = "tokenizer.json"
# What stands between documents, by the names that vocabularies give it; the first is ours.
_SEPARATORS = (
    *("<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>"),
    *("<|begin_of_text|>", "</s>", "<eos>"),
)
# Text on which a tokenizer has to lose nothing.
_PROBE = "Two  words,\ttabs\n\n    def f(x):\r\n  caf\u00e9 \u4e16\u754c \U0001f642 \x01 1234567 "
_BATCH_BYTES = 1 << 20  # of text that is encoded in parallel


class Tokenizer(Protocol):
    """What the data, the trainer and generation use."""

    name: str  # for people, as in "a vocabulary for bytes"
    unit: str  # what a token is called: "bytes" or "tokens"
    vocab_size: int  # tokens are 0 ... vocab_size - 1; a model's vocab_size may be larger
    separator: int  # the token in front of every document; never in a text
    fingerprint: str  # tells two tokenizers apart

    @property
    def byte_counts(self) -> Tensor:
        """How many bytes each token stands for, int64 [vocab_size]; 0 for the separator."""

    def encode(self, text: bytes) -> np.ndarray:
        """The tokens of a text, 1-D unsigned integers, without separators."""

    def encode_all(self, texts: Iterable[bytes]) -> Iterator[np.ndarray]:
        """`encode` of many texts, in their order, with what parallelism there is."""

    def decode(self, tokens: Iterable[int]) -> bytes:
        """The bytes of tokens; those of a part of a text are a part of its bytes."""

    def save(self, directory: Path) -> None:
        """Writes what `load_tokenizer` needs into a directory."""


class ByteTokenizer:
    """256 bytes and a separator: any text, and nothing to train or load."""

    name = unit = "bytes"
    vocab_size = VOCAB_SIZE
    separator = SEPARATOR
    fingerprint = "bytes"

    @cached_property
    def byte_counts(self) -> Tensor:
        return (torch.arange(VOCAB_SIZE) != SEPARATOR).long()

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8)

    def encode_all(self, texts: Iterable[bytes]) -> Iterator[np.ndarray]:
        return map(self.encode, texts)

    def decode(self, tokens: Iterable[int]) -> bytes:
        return bytes(token for token in tokens if token != SEPARATOR)

    def save(self, directory: Path) -> None:
        """Writes nothing: bytes are what a directory without a tokenizer.json has."""


BYTES = ByteTokenizer()


class JsonTokenizer:
    """A `tokenizer.json` of Hugging Face's `tokenizers`: byte-level BPE, or with a byte fallback.

    What looks like a special token in a text is text. Raises HopeError for a file that is none, for
    a vocabulary without a separator, and for a tokenizer that does not give back what it reads
    (text in Unicode's form NFC; some tokenizers bring all text into it).
    """

    unit = "tokens"

    def __init__(self, content: str, where: str = _FILE) -> None:
        library = need("tokenizers", "data", f"reading {where}")
        try:
            self._tokenizer = library.Tokenizer.from_str(content)
        except Exception as error:  # the library has no class of its own for this
            raise HopeError(f"{where} is not a tokenizer.json: {error}") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # The text as it came: what the library makes of it may change with its version.
        self._content = content
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()
        self.name = f"the tokens of {where}"
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content: index for index, token in added.items() if token.special}
        found = [name for name in _SEPARATORS if name in special]
        if not found:
            raise HopeError(
                f"{where} has no token to put between documents; one of these must be among its "
                f"special tokens: {', '.join(_SEPARATORS)}"
            )
        self.separator = special[found[0]]
        self._bytes = self._bytes_of_tokens(vocabulary, where)
        if len({text for text in self._bytes if len(text) == 1}) < 256:
            raise HopeError(f"{where} must have a token for every one of the 256 bytes")
        read, given = _PROBE.encode(), self.decode(self.encode(_PROBE.encode()).tolist())
        if read != given:
            raise HopeError(
                f"{where} is not a tokenizer that keeps a text as it is: {read!r} comes back as "
                f"{given!r}; a byte-level BPE, as `hope tokenizer` trains it, does"
            )

    def _bytes_of_tokens(self, vocabulary: dict[str, int], where: str) -> list[bytes]:
        """What each token stands for; nothing for special tokens and for gaps."""
        kinds = set(_types(json.loads(self._tokenizer.to_str())["decoder"]))
        if "ByteLevel" in kinds:
            alphabet = {character: byte for byte, character in _byte_characters().items()}

            def plain(token: str) -> bytes:
                return bytes(alphabet[character] for character in token)
        elif "ByteFallback" in kinds:

            def plain(token: str) -> bytes:
                if re.fullmatch("<0x[0-9A-F]{2}>", token):
                    return bytes([int(token[3:5], 16)])
                return token.replace("\u2581", " ").encode()
        else:
            raise HopeError(
                f"{where} must have a decoder of type ByteLevel or ByteFallback, by which every "
                f"token stands for certain bytes, not {', '.join(sorted(kinds)) or 'none'}"
            )
        added = self._tokenizer.get_added_tokens_decoder()
        found = [b""] * self.vocab_size
        for token, index in vocabulary.items():
            if index not in added:
                try:
                    found[index] = plain(token)
                except KeyError as error:
                    raise HopeError(
                        f"{where}: the token {token!r} has {error.args[0]!r}, which stands for no "
                        "byte in a byte-level vocabulary"
                    ) from error
            elif not added[index].special:
                found[index] = token.replace("\u2581", " ").encode()
        return found

    @cached_property
    def byte_counts(self) -> Tensor:
        return torch.tensor([len(text) for text in self._bytes])

    def encode(self, text: bytes) -> np.ndarray:
        return next(self.encode_all([text]))

    def encode_all(self, texts: Iterable[bytes]) -> Iterator[np.ndarray]:
        for batch in _batches(texts, _BATCH_BYTES):
            encodings = self._tokenizer.encode_batch_fast(
                [_text(part) for part in batch], add_special_tokens=False
            )
            for encoding in encodings:
                yield np.array(encoding.ids, np.uint32)

    def decode(self, tokens: Iterable[int]) -> bytes:
        return b"".join(self._bytes[token] for token in tokens)

    def save(self, directory: Path) -> None:
        self.write(directory / _FILE)

    def write(self, path: Path) -> None:
        """Writes the tokenizer.json under any name."""
        path.write_text(self._content, encoding="utf-8")


def _types(description: Any) -> Iterator[str]:
    """The types of a decoder of a tokenizer.json, and of the decoders that it consists of."""
    if description is not None:
        yield description["type"]
        for part in description.get("decoders", ()):
            yield from _types(part)


def _byte_characters() -> dict[int, str]:
    """The character that stands for each byte in a byte-level vocabulary, as GPT-2 defined it.

    Visible characters of Latin-1 stand for themselves, the other bytes, in order, for the
    characters from U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return {byte: chr(byte if byte in visible else next(others)) for byte in range(256)}


def _batches(texts: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    """Texts in lists of about `size` bytes; one at least, so that a long text goes alone."""
    batch, total = [], 0
    for text in texts:
        batch.append(text)
        total += len(text)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _text(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise HopeError(
            f"the text to encode must be UTF-8, which byte 0x{text[error.start]:02x} at offset "
            f"{error.start} is not"
        ) from error


def open_tokenizer(path: str | Path | None) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`; None: bytes."""
    if path is None:
        return BYTES
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise HopeError(f"cannot read the tokenizer {path}: {reason}") from error
    return JsonTokenizer(content, str(path))


def load_tokenizer(directory: Path) -> Tokenizer:
    """That of a checkpoint, or of shards: the tokenizer.json in the directory if there is one."""
    path = directory / _FILE
    return open_tokenizer(path if path.exists() else None)


def train_tokenizer(texts: Iterable[bytes], vocab_size: int) -> JsonTokenizer:
    """A byte-level BPE of at most `vocab_size` tokens: the separator, 256 bytes, and merges.

    The same texts in the same order give the same tokenizer. It has fewer tokens where the texts
    have nothing left to merge.
    """
    if vocab_size < VOCAB_SIZE:
        raise HopeError(
            f"vocab_size must be at least {VOCAB_SIZE}, the bytes and a separator, not {vocab_size}"
        )
    library = need("tokenizers", "data", "training a tokenizer")
    byte_level = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SEPARATORS[:1]),
        initial_alphabet=sorted(_byte_characters().values()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(_text, texts), trainer=trainer)
    return JsonTokenizer(tokenizer.to_str(pretty=True) + "\n")
