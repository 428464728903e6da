"""Tokens of a text: bytes."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hope.data import SEPARATOR, VOCAB_SIZE


class Tokenizer(Protocol):
    separator: int
    vocab_size: int

    @property
    def byte_counts(self) -> Tensor: ...

    def encode(self, text: bytes) -> np.ndarray: ...

    def decode(self, tokens: Iterable[int]) -> bytes: ...


class ByteTokenizer:
    separator = SEPARATOR
    vocab_size = VOCAB_SIZE

    @cached_property
    def byte_counts(self) -> Tensor:
        return (torch.arange(VOCAB_SIZE) != SEPARATOR).long()

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: Iterable[int]) -> bytes:
        return bytes(token for token in tokens if token != SEPARATOR)


BYTES = ByteTokenizer()


def load_tokenizer(directory: Path) -> Tokenizer:
    return BYTES
