"""What a run needs to go on: weights, optimizer and the trainer's own numbers, in one directory.

Written and read by torch.distributed.checkpoint: every rank of a process group writes and reads its
own part, and any number of ranks can read what others have written. Names are those of the model's
parameters, whatever wraps it.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from hope.checkpoint import refuse_other_model, shapes_of
from hope.errors import HopeError
from hope.model import LanguageModel, parameter_shapes


def full_weights(model: LanguageModel) -> dict[str, Tensor]:
    """The whole weights, by name: on the first rank, and on the CPU if there are others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=not _alone())
    shapes = parameter_shapes(model.config)
    weights = get_model_state_dict(model, options=options)
    return {name: weight.reshape(shapes[name]) for name, weight in weights.items()}


def save_state(
    directory: Path, model: nn.Module, optimizer: Optimizer, trainer: dict[str, Any]
) -> None:
    """Writes the state into a new directory; all ranks call it.

    trainer: nested dicts of tensors and of what pickle takes. Raises OSError on a full disk, or any
    other failure.
    """
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "trainer": trainer,
    }
    # atomic_directory brings all files onto the disk at the end.
    writer = dcp.FileSystemWriter(directory, sync_files=False)
    try:
        with _quiet():
            dcp.save(state, storage_writer=writer, no_dist=_alone())
    except CheckpointException as error:
        raise _system_error(error) from error


def load_state(
    directory: Path, model: nn.Module, optimizer: Optimizer, trainer: dict[str, Any]
) -> dict[str, Any]:
    """Reads what `save_state` wrote into model and optimizer; returns the trainer's numbers.

    trainer: as in save_state, with the same keys; their values are replaced. All ranks call it.
    Raises HopeError where a file is missing or damaged, or is of another model or optimizer.
    """
    saved = _metadata(directory).state_dict_metadata
    own = get_model_state_dict(model)
    refuse_other_model(
        directory,
        {
            name.removeprefix("model."): tuple(entry.size)
            for name, entry in saved.items()
            if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
        },
        shapes_of(own),
    )
    moments = get_optimizer_state_dict(model, optimizer)
    for name in list(moments["state"]):  # a parameter that never had a gradient has no moments
        if not any(key.startswith(f"optimizer.state.{name}.") for key in saved):
            del moments["state"][name]
    state = {"model": own, "optimizer": moments, "trainer": trainer}
    try:
        with _quiet():
            dcp.load(state, storage_reader=dcp.FileSystemReader(directory), no_dist=_alone())
    except CheckpointException as error:
        raise HopeError(
            f"cannot read the training state in {directory}: {_reason(error)}"
        ) from error
    set_model_state_dict(model, state["model"])
    # Not strict: moments that were not saved do not exist.
    options = StateDictOptions(strict=False)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    return state["trainer"]


def _metadata(directory: Path) -> Metadata:
    reader = dcp.FileSystemReader(directory)
    try:
        metadata = reader.read_metadata()
    except Exception as error:  # pickle raises nearly anything where a file is not one of its own
        raise HopeError(
            f"cannot read the training state in {directory}: .metadata is missing or damaged "
            f"({_line(error)})"
        ) from error
    if not isinstance(metadata, Metadata):
        raise HopeError(f"{directory / '.metadata'} holds no training state, but {metadata!r:.80}")
    _check_sizes(directory, metadata)
    return metadata


def _check_sizes(directory: Path, metadata: Metadata) -> None:
    """HopeError where a file is missing or shorter than what the metadata says is in it."""
    sizes: dict[str, int] = {}
    for part in (metadata.storage_data or {}).values():
        end = part.offset + part.length
        sizes[part.relative_path] = max(end, sizes.get(part.relative_path, 0))
    for name, size in sizes.items():
        path = directory / name
        if not path.is_file():
            raise HopeError(f"cannot read the training state: {path} is missing")
        if path.stat().st_size < size:
            got = path.stat().st_size
            raise HopeError(
                f"cannot read the training state: {path} is truncated, at {got:,} of {size:,} bytes"
            )


def _alone() -> bool:
    """Whether this process is the only one of the run."""
    return not dist.is_initialized()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that a process alone is alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _reason(error: CheckpointException) -> str:
    return "; ".join(sorted({_line(cause) for cause, _ in error.failures.values()}))


def _line(error: BaseException) -> str:
    """The first line of an error, which always says something."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _system_error(error: CheckpointException) -> OSError:
    """The OSError behind a failure: what writes files turns a full disk into errors of its own."""
    for cause, _ in error.failures.values():
        link: BaseException | None = cause
        while link is not None:
            if isinstance(link, OSError):
                return link
            link = link.__cause__ or link.__context__
    return OSError(_reason(error))
