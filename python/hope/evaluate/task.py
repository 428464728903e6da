"""What a task is to the evaluation."""

from typing import Any, Protocol

from torch import Generator, Tensor, nn

from hope.config import ModelConfig
from hope.model import LanguageModel

IGNORED = -100  # the target where nothing is asked; cross_entropy leaves it out


class Task(Protocol):
    """Sequences made by a rule, with questions; nothing is downloaded.

    name, title, description: of the task, what it is in a few words, and of its figures. settings:
    what a model is judged at, by the name of the column: options of `sample`. vocab_size: of the
    model. longest: tokens of a training sequence, at most.
    """

    name: str
    title: str
    description: str
    settings: dict[str, dict[str, Any]]
    vocab_size: int
    longest: int

    def sample(self, size: int, generator: Generator, **setting: Any) -> tuple[Tensor, Tensor]:
        """Tokens and targets [size, T] int64, IGNORED where nothing is asked.

        Without a setting, a training batch.
        """
        ...

    def model(self, config: ModelConfig) -> nn.Module:
        """What is trained: `model(tokens)` are logits [size, T, vocab_size]."""
        return LanguageModel(config)
