"""Tiny runs that tests train."""

from __future__ import annotations

import json
from dataclasses import replace

from hope import ModelConfig, RunConfig, TitansConfig, TrainConfig

MODEL = ModelConfig(mixer=TitansConfig(heads=2, head_dim=8, chunk_size=8), dim=16, layers=1)
TRAIN = TrainConfig(
    tokens=8 * 4 * 32,
    batch=4,
    sequence=32,
    lr=1e-2,
    validate_every=2,
    validation_tokens=128,
    checkpoint_every=2,
)
CONFIG = RunConfig(model=MODEL, train=TRAIN)
TEXT = "the quick brown fox jumps over the lazy dog\n" * 100


def training(**changes):
    """CONFIG with other settings of the training."""
    return replace(CONFIG, train=replace(TRAIN, **changes))


def records(out):
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_times(lines):
    times = ("seconds", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


def interrupt(trainer, step, action):
    """Lets `action` happen while the trainer is in `step`, counted from 1."""
    next_batch = trainer.sampler.next_batch

    def hooked():
        if trainer.step == step - 1:
            action()
        return next_batch()

    trainer.sampler.next_batch = hooked


# CONFIG as options of `hope train`.
OPTIONS = [
    f"--set={name}={value}"
    for name, value in {
        "model.mixer": "titans",
        "model.mixer.heads": 2,
        "model.mixer.head_dim": 8,
        "model.mixer.chunk_size": 8,
        "model.dim": 16,
        "model.layers": 1,
        "train.tokens": TRAIN.tokens,
        "train.batch": TRAIN.batch,
        "train.sequence": TRAIN.sequence,
        "train.lr": TRAIN.lr,
        "train.validate_every": TRAIN.validate_every,
        "train.validation_tokens": TRAIN.validation_tokens,
        "train.checkpoint_every": TRAIN.checkpoint_every,
    }.items()
]
