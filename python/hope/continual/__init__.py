"""Continual learning: models that go on learning after their training."""

from hope.continual.learner import Learner, learn_config, learned_weights
from hope.continual.transformer import from_transformer

__all__ = ["Learner", "from_transformer", "learn_config", "learned_weights"]
