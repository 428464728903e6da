"""The synthetic tasks of Mechanistic Architecture Design (MAD, arXiv 2403.17844), one class each.

Six small skills, on which small models already differ as large ones do on text. Vocabularies,
lengths and shares of noise are those of MAD's baselines. What differs: training texts are always
new ones, where MAD repeats 12,800 (memorization: 256); only what the text or the task determines is
trained, where MAD trains the recall tasks on every next token; and all difficulties are judged with
one model, so that longer texts or more noise than in training ask it to generalise.
"""

import math
import random
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from hope.config import ModelConfig
from hope.evaluate.task import IGNORED, Task
from hope.layers.unit import RMSNorm
from hope.model import LanguageModel


class InContextRecall(Task):
    """`k1 v1 k2 v2 ...`: what value does a key have that has been seen before?

    In every text each key has one value, drawn anew; the pairs' keys are drawn with repetition. The
    model is asked for the value after every key that has occurred before; the last key has. With
    noise, some pairs are replaced by two tokens of a vocabulary of their own.
    """

    name = "in-context-recall"
    title = "MAD: what value a key had in this text"
    description = "the share of repeated keys whose value the model names; by tokens of text"
    settings: ClassVar[dict[str, dict[str, Any]]] = {
        f"{tokens} tokens": {"tokens": tokens} for tokens in (128, 256, 512)
    }
    keys, values = 8, 8
    noise_tokens, noise = 0, 0.0  # how many there are, and the share of pairs that are noise
    vocab_size = keys + values
    longest = 128

    def sample(
        self,
        size: int,
        generator: Generator,
        *,
        tokens: int = longest,
        noise: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`size` texts and what is asked at their tokens, [size, tokens] int64 each."""
        share = self.noise if noise is None else noise
        pairs, rows = tokens // 2, torch.arange(size)
        keys = torch.randint(self.keys, (size, pairs), generator=generator)
        noisy = torch.rand(size, pairs, generator=generator) < share
        # One pair before the last is none in any case, and the last repeats a key from before it.
        noisy[rows, torch.randint(pairs - 1, (size,), generator=generator)] = False
        noisy[:, -1] = False
        told = nn.functional.one_hot(keys[:, :-1], self.keys)
        seen = (told * ~noisy[:, :-1, None]).amax(1)  # [size, keys]
        keys[:, -1:] = torch.multinomial(seen.float(), 1, generator=generator)
        own = self.keys + torch.randint(self.values, (size, self.keys), generator=generator)
        values = own.gather(1, keys)
        text = torch.stack((keys, values), 2)  # [size, pairs, 2]
        if self.noise_tokens:
            first = self.keys + self.values
            other = torch.randint(self.noise_tokens, text.shape, generator=generator)
            text = torch.where(noisy[..., None], first + other, text)
        counts = (nn.functional.one_hot(keys, self.keys) * ~noisy[..., None]).cumsum(1)
        repeated = (counts.gather(2, keys[..., None])[..., 0] > 1) & ~noisy
        targets = torch.full_like(text, IGNORED)
        targets[..., 0] = values.where(repeated, IGNORED)
        return text.flatten(1), targets.flatten(1)


class NoisyInContextRecall(InContextRecall):
    """In-context recall where every fifth pair, in training, is two tokens of noise."""

    name = "noisy-in-context-recall"
    title = "MAD: the same with noise between the pairs"
    description = "the share of repeated keys whose value the model names; by the share of noise"
    settings: ClassVar[dict[str, dict[str, Any]]] = {
        f"{noise:.0%} noise": {"noise": noise} for noise in (0.2, 0.4, 0.6, 0.8)
    }
    noise_tokens, noise = 16, 0.2
    vocab_size = InContextRecall.vocab_size + noise_tokens


class FuzzyInContextRecall(Task):
    """In-context recall where keys and values are motifs of one to three tokens.

    A motif's tokens differ; keys and values have tokens of their own, so it is plain where a motif
    ends, once the next one begins. In every text a key has one value. The model is asked for every
    token of the value of a key that has occurred before; the last key has. Judged with keys of
    three tokens, as MAD does. Texts are filled up with padding in front.
    """

    name = "fuzzy-in-context-recall"
    title = "MAD: the same with keys and values of several tokens"
    description = "the share of right tokens in the values of repeated keys; by tokens of text"
    settings: ClassVar[dict[str, dict[str, Any]]] = {
        f"{tokens} tokens": {"tokens": tokens, "key_size": 3} for tokens in (128, 256, 512)
    }
    keys, values = range(7), range(7, 15)
    sizes = (1, 2, 3)
    padding = 15
    vocab_size = padding + 1
    longest = 128

    def sample(
        self,
        size: int,
        generator: Generator,
        *,
        tokens: int = longest,
        key_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`size` texts and what is asked at their tokens, [size, tokens] int64 each.

        key_size: of all keys; None draws one for each pair.
        """
        draw = random.Random(int(torch.randint(2**62, (), generator=generator)))
        key_sizes = self.sizes if key_size is None else (key_size,)
        texts = [self._text(draw, tokens, key_sizes) for _ in range(size)]
        return tuple(map(torch.tensor, zip(*texts, strict=True)))

    def _text(
        self, draw: random.Random, tokens: int, key_sizes: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        own: dict[tuple[int, ...], tuple[int, ...]] = {}
        text: list[int] = []
        targets: list[int] = []

        def tell(key: tuple[int, ...]) -> None:
            known = key in own
            value = own.setdefault(key, self._motif(draw, self.values, draw.choice(self.sizes)))
            text.extend(key + value)
            ask = value if known else (IGNORED,) * len(value)
            targets.extend((IGNORED,) * (len(key) - 1) + ask + (IGNORED,))

        pair = max(key_sizes) + max(self.sizes)
        while len(text) + 2 * pair <= tokens:  # a pair, and the last one
            tell(self._motif(draw, self.keys, draw.choice(key_sizes)))
        tell(draw.choice(list(own)))
        fill = tokens - len(text)
        return [self.padding] * fill + text, [IGNORED] * fill + targets

    @staticmethod
    def _motif(draw: random.Random, alphabet: Sequence[int], size: int) -> tuple[int, ...]:
        return tuple(draw.sample(alphabet, size))


class SelectiveCopying(Task):
    """Sixteen tokens at random places among blanks, then a mark: which were they, in order?

    After the mark come sixteen blanks; the model is asked for the n-th token at the n-th of them.
    """

    name = "selective-copying"
    title = "MAD: repeating tokens that are scattered among blanks"
    description = "the share of right tokens in the copy; by tokens of text"
    settings: ClassVar[dict[str, dict[str, Any]]] = {
        f"{tokens} tokens": {"tokens": tokens} for tokens in (256, 512, 1024)
    }
    copied, symbols = 16, 14
    blank, mark = symbols, symbols + 1
    vocab_size = symbols + 2
    longest = 256

    def sample(
        self, size: int, generator: Generator, *, tokens: int = longest
    ) -> tuple[Tensor, Tensor]:
        """`size` texts and what is asked at their tokens, [size, tokens] int64 each."""
        first = tokens - self.copied  # of the copy
        symbols = torch.randint(self.symbols, (size, self.copied), generator=generator)
        places = torch.rand(size, first - 1, generator=generator).argsort(1)[:, : self.copied]
        text = torch.full((size, tokens), self.blank)
        text.scatter_(1, places.sort(1).values, symbols)
        text[:, first - 1] = self.mark
        targets = torch.full_like(text, IGNORED)
        targets[:, first:] = symbols
        return text, targets


class Compression(Task):
    """Random tokens, then a mark: all of them have to be found in the mark's encoding alone.

    The encoding is what the model's head would read at the mark. A decoder that is trained along,
    an MLP, gets it and the number of a place, and names the token there (see Compressor). So the
    only way from the text to an answer is through one vector.
    """

    name = "compression"
    title = "MAD: a text in one vector"
    description = "the share of tokens that are found in the encoding of all; by their number"
    settings: ClassVar[dict[str, dict[str, Any]]] = {
        f"{tokens} tokens": {"tokens": tokens} for tokens in (15, 31)
    }
    symbols = 15
    mark = symbols
    vocab_size = symbols + 1
    longest = 32

    def sample(
        self, size: int, generator: Generator, *, tokens: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """`size` texts of `tokens` tokens and the mark, [size, tokens + 1] int64, and the same as
        what is asked, but for the mark.

        tokens: None draws 15 or 31 for the batch.
        """
        if tokens is None:
            tokens = (15, 31)[int(torch.randint(2, (), generator=generator))]
        text = torch.randint(self.symbols, (size, tokens), generator=generator)
        end = torch.full((size, 1), self.mark)
        return torch.cat((text, end), 1), torch.cat((text, torch.full_like(end, IGNORED)), 1)

    def model(self, config: ModelConfig) -> nn.Module:
        return Compressor(config)


class Memorization(Task):
    """`k1 ? k2 ? ...`: what value does a key have in all texts?

    Each of 127 keys has a value, no two the same, that never occurs in a text; the model is asked
    for it at the mark after each key. It can only be learned in training, by the weights.
    """

    name = "memorization"
    title = "MAD: facts that are the same in all texts"
    description = "the share of keys whose value the model has learned"
    settings: ClassVar[dict[str, dict[str, Any]]] = {"accuracy": {}}
    keys = 127
    mark = 255
    vocab_size = 256
    longest = 32

    def __init__(self) -> None:
        # The same facts in training and judging, and in every evaluation.
        order = torch.randperm(128, generator=Generator().manual_seed(0))
        self.facts = self.keys + order[: self.keys]

    def sample(self, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """`size` texts and what is asked at their tokens, [size, 32] int64 each."""
        keys = torch.randint(self.keys, (size, self.longest // 2), generator=generator)
        text = torch.stack((keys, torch.full_like(keys, self.mark)), 2)
        targets = torch.stack((torch.full_like(keys, IGNORED), self.facts[keys]), 2)
        return text.flatten(1), targets.flatten(1)


class Compressor(nn.Module):
    """A LanguageModel as encoder, and a decoder of one vector: [B, T] to logits [B, T, vocab_size].

    The decoder reads the encoding of the last token plus sines and cosines of a place's number, and
    has two layers as wide as the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.encoder = LanguageModel(config)
        self.decoder = nn.Sequential(
            *(RMSNorm(dim), nn.Linear(dim, dim), nn.GELU()),
            *(RMSNorm(dim), nn.Linear(dim, dim), nn.GELU()),
            *(RMSNorm(dim), nn.Linear(dim, config.vocab_size)),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.encoder.features(tokens)
        places = _sinusoids(tokens.shape[1], x.shape[2]).to(x)
        return self.decoder(x[:, -1:] + places).float()


def _sinusoids(count: int, dim: int) -> Tensor:
    """Sines, then cosines, of places at frequencies from 1 down to 1/10,000, [count, dim]."""
    frequencies = torch.exp(-math.log(10_000) * torch.linspace(0, 1, (dim + 1) // 2))
    angles = torch.arange(count)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), 1)[:, :dim]


MAD_TASKS: tuple[Task, ...] = (
    InContextRecall(),
    FuzzyInContextRecall(),
    NoisyInContextRecall(),
    SelectiveCopying(),
    Compression(),
    Memorization(),
)
