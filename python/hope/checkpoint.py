"""Checkpoints: one directory each, complete or absent.

`<run>/checkpoints/step-00000400/` holds `model.safetensors` (the weights), `config.json` (the
RunConfig) and `trainer.pt` (optimizer, sampler and random state, for `--resume`; not needed to use
the model), and the `tokenizer.json` of a run that does not read bytes.
"""

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hope.config import RunConfig, from_dict, to_dict
from hope.errors import HopeError
from hope.files import atomic_directory
from hope.model import LanguageModel
from hope.tokenizers import BYTES, Tokenizer

_MODEL, _CONFIG, _TRAINER = "model.safetensors", "config.json", "trainer.pt"


def save_checkpoint(
    run: Path,
    step: int,
    config: RunConfig,
    model: LanguageModel,
    trainer: dict[str, Any],
    keep: int,
    tokenizer: Tokenizer = BYTES,
) -> Path:
    """Writes the checkpoint of `step`, removes all but the newest `keep`; returns its directory."""
    path = run / "checkpoints" / f"step-{step:08d}"
    with atomic_directory(path) as directory:
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, directory / _MODEL)
        (directory / _CONFIG).write_text(json.dumps(to_dict(config), indent=2) + "\n")
        tokenizer.save(directory)
        torch.save(trainer, directory / _TRAINER)
    for old in _checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return path


def _checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    found = [
        path for path in run.glob("checkpoints/step-*") if re.fullmatch(r"step-\d+", path.name)
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def has_checkpoint(run: Path) -> bool:
    """Whether there is anything to resume in a run's directory."""
    return bool(_checkpoints(run))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` is, or the newest one of the run that `path` is."""
    if (path / _MODEL).is_file():
        return path
    if not path.exists():
        raise HopeError(f"no such run or checkpoint: {path}")
    checkpoints = _checkpoints(path)
    if not checkpoints:
        raise HopeError(f"there is no checkpoint in {path}")
    return checkpoints[-1]


def load_config(checkpoint: Path) -> RunConfig:
    """The RunConfig of a checkpoint directory."""
    try:
        data = json.loads((checkpoint / _CONFIG).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise HopeError(f"cannot read {checkpoint / _CONFIG}: {error}") from error
    return from_dict(RunConfig, data)


def load_weights(model: LanguageModel, checkpoint: Path) -> None:
    """Reads a checkpoint's weights into `model`, onto the device it is on."""
    path = checkpoint / _MODEL
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise HopeError(f"cannot read the weights in {path}: {error}") from error


def load_trainer(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state of a checkpoint, on the CPU."""
    path = checkpoint / _TRAINER
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise HopeError(f"cannot read the trainer's state in {path}: {error}") from error


def load_model(path: str | Path, device: str | torch.device = "cpu") -> LanguageModel:
    """The model of a run (its newest checkpoint) or of one checkpoint, in evaluation mode."""
    checkpoint = find_checkpoint(Path(path))
    model = LanguageModel(load_config(checkpoint).model).to(device)
    load_weights(model, checkpoint)
    return model.eval()
