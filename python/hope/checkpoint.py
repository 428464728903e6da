"""Checkpoints: one directory each, complete or absent.

`<run>/checkpoints/step-00000400/` holds `model.safetensors` (the weights), `config.json` (the
RunConfig), the `tokenizer.json` of a run that does not read bytes, and `state/` (what `--resume`
needs: hope.training_state). The first three are a model that can be used; the last is not needed
for that.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer

from hope.config import RunConfig, from_dict, to_dict
from hope.device import check_sizes
from hope.errors import HopeError
from hope.files import atomic_directory, partial_directory, remove_partial
from hope.model import LanguageModel, parameter_shapes
from hope.tokenizers import BYTES, Tokenizer, load_tokenizer

_MODEL, _CONFIG, _STATE, _TOKENIZER = "model.safetensors", "config.json", "state", "tokenizer.json"
_OLD_STATE = "trainer.pt"
Shapes = dict[str, tuple[int, ...]]


def save_checkpoint(
    run: Path,
    step: int,
    config: RunConfig,
    model: LanguageModel,
    optimizer: Optimizer,
    trainer: dict[str, Any],
    keep: int,
    tokenizer: Tokenizer = BYTES,
) -> Path:
    """Writes the checkpoint of `step`, removes all but the newest `keep`; returns its directory.

    All ranks of a process group call it: each writes its part of the state, and the first one the
    rest. trainer: what else the run needs to go on (hope.training_state). Raises OSError, and
    leaves the older checkpoints, where it cannot be written.
    """
    from hope.training_state import full_weights, save_state  # slow to import, needed only here

    path = run / "checkpoints" / f"step-{step:08d}"
    weights = full_weights(model)
    with named_errors(run, step), _directory_of_all_ranks(path) as directory:
        if _is_first():
            contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
            save_file(contiguous, directory / _MODEL)
            (directory / _CONFIG).write_text(json.dumps(to_dict(config), indent=2) + "\n")
            tokenizer.save(directory)
        save_state(directory / _STATE, model, optimizer, trainer)
    if _is_first():
        for old in _checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    return path


def _is_first() -> bool:
    """Whether this process writes what only one may write."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextlib.contextmanager
def _directory_of_all_ranks(path: Path) -> Iterator[Path]:
    """A new directory for all ranks to write into, which the first one makes and completes."""
    barrier = dist.barrier if dist.is_initialized() else lambda: None
    with contextlib.ExitStack() as stack:
        if _is_first():
            remove_partial(path.parent)  # what a killed process left
            stack.enter_context(atomic_directory(path))
        barrier()
        yield partial_directory(path)
    barrier()


@contextlib.contextmanager
def named_errors(run: Path, step: int) -> Iterator[None]:
    """Says of a failed write, as an OSError, which checkpoint it was and what is left."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number, reason = _system_reason(error)
        found = _checkpoints(run)
        left = f"the newest one, {found[-1].name}, is whole" if found else "there is none yet"
        message = f"cannot write the checkpoint of step {step}: {reason}; {left}"
        raise OSError(number, message, str(run / "checkpoints")) from error


def _system_reason(error: OSError | SafetensorError) -> tuple[int, str]:
    """The system's number of an error, and what it means; safetensors has it in its message."""
    if isinstance(error, OSError):
        return error.errno or 0, error.strerror or str(error)
    found = re.search(r"I/O error: (.*) \(os error (\d+)\)", str(error))
    return (int(found[2]), found[1]) if found else (0, str(error))


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
    path = checkpoint / _CONFIG
    try:
        return from_dict(RunConfig, json.loads(path.read_text()))
    except HopeError as error:
        raise HopeError(f"{path} is not the config of a run: {error}") from error
    except OSError as error:
        raise HopeError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # ValueError: neither JSON nor text
        raise HopeError(f"cannot read {path}: {error}") from error


def load_weights(model: LanguageModel, checkpoint: Path) -> None:
    """Reads a checkpoint's weights into `model`, onto the device it is on."""
    path = checkpoint / _MODEL
    _check_weights(model, path)
    weights = load_file(path)
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise HopeError(f"{path} is damaged: {name} has numbers that are not finite")
    model.load_state_dict(weights)


def _check_weights(model: LanguageModel, path: Path) -> None:
    """HopeError where a file of weights is damaged, or is not of this model."""
    try:
        with safe_open(path, "pt") as file:
            saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise HopeError(f"cannot read the weights in {path}: {error}") from error
    own = {name: tuple(shape) for name, shape in parameter_shapes(model.config).items()}
    refuse_other_model(path, saved, own)


def shapes_of(weights: dict[str, torch.Tensor]) -> Shapes:
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def refuse_other_model(path: Path, saved: Shapes, own: Shapes) -> None:
    """HopeError, with the first difference, where `path` has other weights than the model has."""
    for name in {**own, **saved}:
        if saved.get(name) != own.get(name):
            there, here = (
                f"of shape {list(shapes[name])}" if name in shapes else "absent"
                for shapes in (saved, own)
            )
            raise HopeError(
                f"{path} is of another model: {name} is {there} there, but {here} in the model "
                "that config.json describes"
            )


def load_state(
    checkpoint: Path, model: LanguageModel, optimizer: Optimizer, trainer: dict[str, Any]
) -> dict[str, Any]:
    """Reads into model and optimizer what a run goes on from; returns its trainer's numbers.

    trainer: as in save_checkpoint, with the same keys. All ranks call it. Raises HopeError where a
    file is missing, damaged, or of another model.
    """
    from hope import training_state  # slow to import, needed only here

    directory = checkpoint / _STATE
    if not directory.is_dir():
        if (checkpoint / _OLD_STATE).exists():
            raise HopeError(
                f"{checkpoint} was written by an older version, which kept its state in "
                f"{_OLD_STATE}: the model can be used, but its training not continued"
            )
        raise HopeError(f"cannot resume from {checkpoint}: {directory} is missing")
    _check_weights(model, checkpoint / _MODEL)  # also a checkpoint that is resumed is whole
    return training_state.load_state(directory, model, optimizer, trainer)


def load_model(path: str | Path, device: str | torch.device = "cpu") -> LanguageModel:
    """The model of a run (its newest checkpoint) or of one checkpoint, in evaluation mode."""
    checkpoint = find_checkpoint(Path(path))
    config = load_config(checkpoint).model
    check_sizes(config, device)
    model = LanguageModel(config).to(device)
    load_weights(model, checkpoint)
    return model.eval()


def export_model(path: Path, out: Path) -> list[Path]:
    """Copies what a model consists of, without what training needs, to a new directory.

    path: a run or a checkpoint. Returns the new files, which `load_model(out)` reads. Raises
    HopeError where `out` is not empty, or the checkpoint is damaged.
    """
    checkpoint = find_checkpoint(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HopeError(f"{out} is not empty; choose another directory for the model")
    with torch.device("meta"):
        model = LanguageModel(load_config(checkpoint).model)
    _check_weights(model, checkpoint / _MODEL)
    load_tokenizer(checkpoint)  # raises HopeError for a damaged one
    sources = [checkpoint / name for name in (_MODEL, _CONFIG, _TOKENIZER)]
    sources = [source for source in sources if source.exists()]
    with atomic_directory(out) as directory:
        for source in sources:
            shutil.copyfile(source, directory / source.name)
    return [out / source.name for source in sources]
