"""Reading texts with a trained model: side by side and in blocks, the state carried along."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hope.checkpoint import find_checkpoint, load_config, load_model
from hope.config import TrainConfig
from hope.errors import HopeError
from hope.model import ModelState
from hope.tokenizers import BYTES, Tokenizer, load_tokenizer
from hope.train import autocast

Tokens = Sequence[int]


@dataclass(frozen=True)
class Part:
    """What a block of a batch of texts has shown, on the CPU.

    rows: the texts in it, int64 [R], by their place in the call. start: the first token that it
    predicts. log_p, likeliest, inside: [R, n], for tokens start, start + 1, ...: the logarithm of
    the token's probability, whether it is the likeliest of those in use (a model's vocabulary may
    be larger), and whether the text has such a token.
    """

    rows: Tensor
    start: int
    log_p: Tensor
    likeliest: Tensor
    inside: Tensor


class Reader:
    """A model that reads texts, lists of tokens that begin with the separator, in bounded memory.

    It reads `batch` texts side by side and `block` tokens in a call. What it has read is in the
    model's state, which for memories does not grow with the text; so all figures are those of one
    call over a whole text. dtype: of the activations, "float32" or "bfloat16".
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer = BYTES,
        *,
        batch: int = 16,
        block: int = 512,
        dtype: str = "float32",
    ) -> None:
        for name, value in (("batch", batch), ("block", block)):
            if value < 1:
                raise HopeError(f"{name} must be at least 1, not {value}")
        self.model, self.tokenizer, self.batch, self.block = model, tokenizer, batch, block
        self.device = next(model.parameters()).device
        self._train = TrainConfig(dtype=dtype)

    @classmethod
    def of_run(
        cls, run: str | Path, device: str | torch.device = "cpu", *, batch: int = 16
    ) -> "Reader":
        """Of a run's newest checkpoint, or of one checkpoint, with the dtype of its training."""
        checkpoint = find_checkpoint(Path(run))
        dtype = load_config(checkpoint).train.dtype
        model, tokenizer = load_model(checkpoint, device), load_tokenizer(checkpoint)
        return cls(model, tokenizer, batch=batch, dtype=dtype)

    def encode(self, text: str | bytes) -> list[int]:
        """The tokens of a text, without a separator."""
        return self.tokenizer.encode(text.encode() if isinstance(text, str) else text).tolist()

    def decode(self, tokens: Tokens) -> str:
        """The text of tokens; what is no UTF-8 becomes U+FFFD."""
        return self.tokenizer.decode(tokens).decode(errors="replace")

    @torch.inference_mode()
    def read(self, texts: Sequence[Tokens], state: ModelState | None = None) -> Iterator[Part]:
        """How likely every token of a batch of texts is, given those before it; not the first.

        state: of what all the texts continue (a batch of 1). Shorter texts are filled up: a causal
        model's figures do not change by what follows, and a text that has ended leaves the batch.
        """
        tokens, lengths, order = self._side_by_side(texts)
        if state is not None:
            state = _each(state, lambda leaf: leaf.expand(len(texts), *leaf.shape[1:]).clone())
        for start in range(0, max(map(len, texts), default=0) - 1, self.block):
            rows = int((lengths > start + 1).sum())
            state = _rows(state, 0, rows)
            window = tokens[:rows, start : start + self.block + 1]
            targets = window[:, 1:]
            with autocast(self.device, self._train):
                logits, state = self.model(window[:, :-1], state, return_state=True)
            nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            places = torch.arange(start + 1, start + 1 + targets.shape[1])
            yield Part(
                rows=order[:rows],
                start=start + 1,
                log_p=-nats.view_as(targets).cpu(),
                likeliest=(logits[..., : self.tokenizer.vocab_size].argmax(-1) == targets).cpu(),
                inside=places < lengths[:rows, None],
            )

    def score(
        self, texts: Sequence[Tokens], first: Sequence[int], state: ModelState | None = None
    ) -> list[tuple[float, bool]]:
        """Of every text, log p of its tokens from the `first` on (>= 1), and whether each is the
        likeliest.

        state: of what all the texts continue.
        """
        results = []
        for begin in range(0, len(texts), self.batch):
            some = texts[begin : begin + self.batch]
            asked = torch.tensor(first[begin : begin + self.batch])
            total = torch.zeros(len(some), dtype=torch.float64)
            greedy = torch.ones(len(some), dtype=torch.bool)
            for part in self.read(some, state):
                places = torch.arange(part.start, part.start + part.log_p.shape[1])
                counted = part.inside & (places >= asked[part.rows, None])
                total[part.rows] += part.log_p.double().where(counted, 0.0).sum(1)
                greedy[part.rows] &= (part.likeliest | ~counted).all(1)
            results += zip(total.tolist(), greedy.tolist(), strict=True)
        return results

    @torch.inference_mode()
    def states(self, texts: Sequence[Tokens]) -> list[ModelState | None]:
        """The state after each of a batch of texts; None after an empty one.

        Texts of different lengths are read side by side: a call ends wherever a text does.
        """
        tokens, lengths, order = self._side_by_side(texts)
        results: list[ModelState | None] = [None] * len(texts)
        rows, start, state = int((lengths > 0).sum()), 0, None
        while rows:
            stop = min(start + self.block, int(lengths[rows - 1]))
            with autocast(self.device, self._train):
                _, state = self.model.features(tokens[:rows, start:stop], state)
            start = stop
            while rows and lengths[rows - 1] == start:
                rows -= 1
                results[order[rows]] = _rows(state, rows, rows + 1)
            state = _rows(state, 0, rows)
        return results

    @torch.inference_mode()
    def continuation(
        self,
        token: int,
        state: ModelState | None,
        choose: Callable[[Tensor], Tensor] = torch.argmax,
    ) -> Iterator[int]:
        """What follows `token`, and what is before it in the state; up to a separator, which is not
        given.

        choose: a token [] from the logits [V] of all; the likeliest without.
        """
        while True:
            inputs = torch.tensor([[token]], device=self.device)
            with autocast(self.device, self._train):
                logits, state = self.model(inputs, state, return_state=True)
            token = int(choose(logits[0, -1, : self.tokenizer.vocab_size]))
            if token == self.tokenizer.separator:
                return
            yield token

    def _side_by_side(self, texts: Sequence[Tokens]) -> tuple[Tensor, Tensor, Tensor]:
        """Texts in one tensor [B, longest], the longest first; their lengths, and their places."""
        lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64)
        order = lengths.argsort(descending=True, stable=True)
        rows = [torch.tensor(texts[i], dtype=torch.int64) for i in order.tolist()]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows else lengths[:, None]
        return tokens.to(self.device), lengths[order], order


def _rows(state: ModelState | None, start: int, stop: int) -> ModelState | None:
    """A state of some of the texts in a batch."""
    return _each(state, lambda leaf: leaf[start:stop])


def _each(state: ModelState | None, change: Callable[[Tensor], Tensor]) -> ModelState | None:
    return pytree.tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, state)
