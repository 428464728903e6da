"""Where the numbers of a run go: a record for every step and every validation.

A step's record has step, tokens, train_bits_per_byte, gradient_norm (before clipping), lr,
tokens_per_second and seconds (of training, so far); a validation's has step, tokens and
validation_bits_per_byte. docs/training.md says more.
"""

import contextlib
import json
import math
import shutil
import uuid
from pathlib import Path
from typing import Any, Protocol

from hope.config import RunConfig, to_dict
from hope.errors import HopeError
from hope.extras import need
from hope.files import atomic_file

FILE = "metrics.jsonl"
_TENSORBOARD, _WANDB = "tensorboard", "wandb.id"
Record = dict[str, Any]


class Writer(Protocol):
    def write(self, record: Record) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Every writer that a run's settings ask for; the records of steps after `step` are removed.

    Those are what a killed run wrote after its last checkpoint, and are written again. None: no
    writer, because another rank writes. Raises HopeError where a package is missing, before it
    writes anything.
    """

    def __init__(self, config: RunConfig, out: Path, step: int | None) -> None:
        check_packages(config)
        self._writers: list[Writer] = []
        if step is None:
            return
        self._writers = [JsonLines(out / FILE, step)]
        if config.train.tensorboard:
            self._writers.append(TensorBoard(out / _TENSORBOARD, step))
        if config.train.wandb is not None:
            self._writers.append(WeightsAndBiases(config, out))

    def write(self, record: Record) -> None:
        for writer in self._writers:
            writer.write(record)

    def flush(self) -> None:
        """Leaves nothing in this process that a kill could take; called before a checkpoint."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def remove_metrics(out: Path) -> None:
    """Removes what the writers have left of a run that begins anew."""
    for path in (out / FILE, out / _WANDB):
        path.unlink(missing_ok=True)
    for directory in (out / _TENSORBOARD, out / "wandb"):
        shutil.rmtree(directory, ignore_errors=True)


def check_packages(config: RunConfig) -> None:
    """HopeError where the settings need a package that is not installed."""
    if config.train.tensorboard:
        need("tensorboard", "tensorboard", "train.tensorboard")
    if config.train.wandb is not None:
        need("wandb", "wandb", "train.wandb")


class JsonLines:
    """`metrics.jsonl`: one JSON object per record. step: the last one that stays."""

    def __init__(self, path: Path, step: int) -> None:
        if path.exists():
            try:
                lines = path.read_text().splitlines()
            except UnicodeDecodeError as error:
                raise HopeError(f"{path} is not the metrics of a run: {error}") from error
            with atomic_file(path) as new:
                new.write_text("".join(line + "\n" for line in lines if _step_of(line) <= step))
        self._path, self._file = path, path.open("a", buffering=1)

    def write(self, record: Record) -> None:
        try:
            self._file.write(json.dumps(record) + "\n")
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.close()  # it tries once more to write what it has
            message = f"cannot write the metrics of step {record['step']}: {error.strerror}"
            raise OSError(error.errno, message, str(self._path)) from error

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    """The step of a metrics line; of one that a kill cut short, infinity."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, RecursionError):
        return math.inf
    except (TypeError, KeyError) as error:
        raise HopeError(f"metrics.jsonl has a line without a step: {line[:80]}") from error


class TensorBoard:
    """TensorBoard's events: every field of a record is a scalar of that name, at its step."""

    def __init__(self, directory: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, seldom needed

        # Events after `step` are in older files, which TensorBoard then no longer shows.
        self._writer = SummaryWriter(str(directory), purge_step=step + 1)

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb, in the project `train.wandb`; a resumed run goes on with the same one.

    wandb takes no second record of a step, so that it keeps the first of those written twice.
    """

    def __init__(self, config: RunConfig, out: Path) -> None:
        wandb = need("wandb", "wandb", "train.wandb")
        identity = out / _WANDB
        if not identity.exists():
            with atomic_file(identity) as new:
                new.write_text(uuid.uuid4().hex)
        self._run = wandb.init(
            project=config.train.wandb,
            id=identity.read_text(),
            resume="allow",
            name=out.name,
            dir=str(out),
            config=to_dict(config),
        )

    def write(self, record: Record) -> None:
        self._run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def flush(self) -> None:
        pass  # a process of its own sends what it has got

    def close(self) -> None:
        self._run.finish()
