"""Models side by side: the same text in the same order, and the same number of tokens.

A comparison is a directory: a run's directory for each preset, `compare.json` (every run's config
and, once it has ended, its figures and curves) and `compare.png`.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hope.checkpoint import has_checkpoint
from hope.config import RunConfig, from_dict, to_dict
from hope.data import Corpus
from hope.device import check_sizes
from hope.errors import HopeError
from hope.files import atomic_file
from hope.model import parameter_count
from hope.plot import plot_runs
from hope.provenance import provenance
from hope.train import Trainer, TrainResult, discard

# What must agree for two runs to read the same batches and be judged on the same text.
_SHARED = ("tokens", "batch", "sequence", "seed", "validation_tokens")
_FILE = "compare.json"


def comparable(configs: Sequence[RunConfig], tokens: int | None = None) -> list[RunConfig]:
    """The configs with one budget: `tokens`, or the first one's.

    HopeError where there are fewer than two, or they would read different batches.
    """
    names = [config.preset for config in configs]
    if len(configs) < 2:
        raise HopeError(f"a comparison needs two presets or more, not {', '.join(names) or 'none'}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise HopeError(f"preset {twice[0]!r} is named twice; a comparison's presets must differ")
    tokens = tokens or configs[0].train.tokens
    configs = [replace(c, train=replace(c.train, tokens=tokens)) for c in configs]
    for config in configs:
        for name in _SHARED:
            first, own = getattr(configs[0].train, name), getattr(config.train, name)
            if own != first:
                raise HopeError(
                    f"{config.preset} and {configs[0].preset} cannot be compared: train.{name} is "
                    f"{own} and {first}; --set train.{name}=... makes them equal"
                )
    return configs


class Comparison:
    """Trains `configs` (which are `comparable`) on one corpus, one after the other, below `out`.

    resume: runs with a checkpoint in `out` go on from it, or are finished; the others begin anew.
    Raises HopeError as Trainer does.
    """

    def __init__(
        self,
        configs: Sequence[RunConfig],
        corpus: Corpus,
        out: Path,
        device: str | torch.device = "cpu",
        *,
        resume: bool = False,
    ) -> None:
        for config in configs:
            check_sizes(config.model, device)
        if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise HopeError(
                f"{out} is not empty; continue that comparison with --resume, or choose another "
                "--out"
            )
        self.configs, self.corpus, self.out, self.device = configs, corpus, out, device
        self.runs: list[dict[str, Any]] = []

    def run(self, *, progress: bool = True) -> TrainResult | None:
        """Trains until all runs have ended: None; or the result of the run that a signal stopped.

        progress: says which run it is, and shows its bar. Raises TrainingDiverged.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self._write()
        for number, config in enumerate(self.configs, 1):
            run = self.out / config.preset
            resume = has_checkpoint(run)
            if not resume:
                discard(run)
            if progress:
                print(f"run    {number} of {len(self.configs)}: {config.preset}", flush=True)
            trainer = Trainer(config, self.corpus, run, self.device, resume=resume)
            result = trainer.run(progress=progress)
            if result.signal is not None:
                return result
            self.runs.append(figures(config, result))
            self._write()
        plot_runs(self.runs, self.out / "compare.png")
        return None

    def _write(self) -> None:
        content = {
            "data": self.corpus.description,
            **provenance(self.device),
            "configs": [to_dict(config) for config in self.configs],
            "runs": self.runs,
            "table": table(self.runs).splitlines(),
        }
        with atomic_file(self.out / _FILE) as path:
            path.write_text(json.dumps(content, indent=1) + "\n")


def load_comparison(out: Path) -> list[RunConfig]:
    """The configs of the comparison in `out`."""
    path = out / _FILE
    if not path.is_file():
        raise HopeError(f"there is no comparison in {out}: {path} is missing")
    try:
        configs = json.loads(path.read_text())["configs"]
        return [from_dict(RunConfig, config) for config in configs]
    except (HopeError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise HopeError(f"cannot read {path}: {error}") from error


def figures(config: RunConfig, result: TrainResult) -> dict[str, Any]:
    """What a finished run is judged by, and its curves over tokens and seconds of training."""
    lines = result.files["metrics"].read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if "train_bits_per_byte" in record]
    seconds = {record["step"]: record["seconds"] for record in steps}
    validations = [record for record in records if "validation_bits_per_byte" in record]
    return {
        "preset": config.preset,
        "config": to_dict(config),
        "parameters": parameter_count(config.model),
        "tokens": result.tokens,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens / result.seconds,
        "validation_bits_per_byte": result.validation_bits_per_byte,
        "training": {
            "tokens": [record["tokens"] for record in steps],
            "seconds": [round(record["seconds"], 3) for record in steps],
            "bits_per_byte": [round(record["train_bits_per_byte"], 4) for record in steps],
        },
        "validation": {
            "tokens": [record["tokens"] for record in validations],
            "seconds": [round(seconds[record["step"]], 3) for record in validations],
            "bits_per_byte": [record["validation_bits_per_byte"] for record in validations],
        },
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Aligned text with a line for each of the `figures`."""
    rows = [("preset", "parameters", "tokens", "validation bits/byte", "seconds", "tokens/s")]
    rows += [
        (
            run["preset"],
            f"{run['parameters']:,}",
            f"{run['tokens']:,}",
            f"{run['validation_bits_per_byte']:.4f}",
            f"{run['seconds']:,.0f}",
            f"{run['tokens_per_second']:,.0f}",
        )
        for run in runs
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    )
