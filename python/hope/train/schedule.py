"""The learning rate over the steps of a run."""

import math

from hope.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step 0, 1, ...: a linear warm-up to lr, then down to lr * lr_final.

    cosine and linear go down from the warm-up on; wsd stays at lr, and goes down linearly in the
    last `decay` of the steps. What they arrive at is the rate of the step after the last.
    """
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    decay = config.steps - warmup
    if config.schedule == "wsd":
        decay = min(decay, round(config.decay * config.steps))
    progress = max(0.0, (step - (config.steps - decay)) / max(1, decay))
    height = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.lr_final + (1 - config.lr_final) * height)
