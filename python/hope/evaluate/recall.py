"""Associative recall: pairs of keys and values, then queries (as in Zoology, arXiv 2312.04927)."""

from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from hope.evaluate.task import IGNORED, Task


class Recall(Task):
    """`k1 v1 k2 v2 ... kN vN`, then every key again in another order, each before its value.

    The keys of a sequence differ, values may repeat. The model is asked for the value after each
    queried key. A text of N pairs has 4 N tokens. In training N is drawn from 2, 4, 8 and 16; it is
    judged at 32 pairs too, which it was never trained on.
    """

    name = "recall"
    title = "associative recall: which value a key had"
    description = "the share of queried keys whose value the model names; by number of pairs"
    settings: ClassVar[dict[str, dict[str, Any]]] = {
        f"{pairs} pairs": {"pairs": pairs} for pairs in (4, 8, 16, 32)
    }
    keys, values = 64, 32
    vocab_size = keys + values
    longest = 4 * 16

    def sample(
        self, size: int, generator: Generator, *, pairs: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """`size` sequences and what is asked at their tokens, [size, 4 * pairs] int64 each."""
        if pairs is None:
            pairs = 2 << int(torch.randint(4, (), generator=generator))
        keys = torch.rand(size, self.keys, generator=generator).argsort(1)[:, :pairs]
        values = self.keys + torch.randint(self.values, (size, pairs), generator=generator)
        order = torch.rand(size, pairs, generator=generator).argsort(1)
        asked, answers = keys.gather(1, order), values.gather(1, order)
        told = torch.stack((keys, values), 2).flatten(1)
        tokens = torch.cat((told, torch.stack((asked, answers), 2).flatten(1)), 1)
        targets = torch.full_like(tokens, IGNORED)
        targets[:, 2 * pairs :: 2] = answers
        return tokens, targets
