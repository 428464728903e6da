"""Runs of the trainer on several ranks, for tests/test_hope_parallel_train.py."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import torch
import torch.distributed as dist
from hope import HopeError, LanguageModel, RunConfig, Trainer, TrainingDiverged, load_corpus
from hope.optim.base import local
from torch import nn


def trainer_of(config: RunConfig, text: str, out: Path, resume: bool = False) -> Trainer:
    data = replace(config.data, paths=(text,))
    corpus = load_corpus(data, window=config.train.sequence)
    return Trainer(config, corpus, out, resume=resume)


def train(config: RunConfig, text: str, out: Path, resume: bool = False) -> int:
    """A whole run, or the rest of one; the step at which it ends."""
    trainer = trainer_of(config, text, out, resume)
    result = trainer.run(progress=False)
    assert result.signal is None
    return trainer.step


def stderr(config: RunConfig, text: str, out: Path) -> str:
    """What a run that shows its progress prints here."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        trainer_of(config, text, out).run()
    return printed.getvalue()


def train_until_one_is_told_to_stop(config: RunConfig, text: str, out: Path, step: int) -> str:
    """The last rank alone gets SIGTERM while it is in `step`; what stopped this one."""
    trainer = trainer_of(config, text, out)
    if dist.get_rank() == dist.get_world_size() - 1:
        runs.interrupt(trainer, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    result = trainer.run(progress=False)
    assert trainer.step == step
    assert result.sample is None
    return result.signal.name


def diverge(config: RunConfig, text: str, out: Path, value: float) -> str:
    """A number of one rank's part of a weight becomes `value`; what the error says here."""
    trainer = trainer_of(config, text, out)

    def poison() -> None:
        parameter: nn.Parameter = trainer.model.blocks[0].mixer.out.weight
        if dist.get_rank() == dist.get_world_size() - 1:
            with torch.no_grad():
                local(parameter).view(-1)[0] = value

    runs.interrupt(trainer, 2, poison)
    with pytest.raises(TrainingDiverged) as error:
        trainer.run(progress=False)
    return str(error.value)


def refuse(config: RunConfig, text: str, out: Path) -> str:
    with pytest.raises(HopeError) as error:
        trainer_of(config, text, out)
    return str(error.value)


def weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}
