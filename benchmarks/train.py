"""Trains models side by side: the same text in the same order, and the same number of tokens.

    python -m benchmarks.train

One after the other, through `hope.Trainer`. Every model's bits per byte against tokens and against
seconds of training go into one JSON file and one picture.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hope import (
    PRESETS,
    Corpus,
    HopeError,
    RunConfig,
    Trainer,
    TrainingDiverged,
    load_corpus,
    parameter_count,
    preset,
)
from hope.config import override, to_dict
from hope.device import choose_device

from benchmarks import report, sources

DEFAULT_PRESETS = ("tiny", "tiny-transformer", "tiny-conv-attention")
# What must agree for two runs to read the same batches and be judged on the same text.
SHARED = ("tokens", "batch", "sequence", "seed", "validation_tokens")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0, 1 (a training diverged), 2 (wrong use) or 130 (stopped)."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(words)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        device = choose_device(options.device).type
        configs = _configs(options)
        corpus = load_corpus(options.data, window=configs[0].train.sequence)
        print(f"data  {corpus.description}", flush=True)
        neighbours = report.Neighbours()
        runs = [_train(config, corpus, device) for config in configs]
    except HopeError as error:
        parser.error(str(error))
    except TrainingDiverged as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing is written", file=sys.stderr)
        return 130
    machine = neighbours.facts()
    warning = report.loaded(machine)
    table = _table(runs)
    print(f"\n{table}\n")
    if warning:
        print(warning, file=sys.stderr)
    result = {
        "benchmark": "train",
        "command": shlex.join(["python", "-m", "benchmarks.train", *words]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "environment": report.environment(device),
        "neighbours": machine,
        "warning": warning,
        "corpus": {
            "training_tokens": len(corpus.train),
            "validation_tokens": len(corpus.validation),
            "fingerprint": corpus.fingerprint,
        },
        "runs": runs,
        "table": table.splitlines(),
    }
    path = sources.dated(options.out, f"train-{device}")
    sources.write_json(path.with_suffix(".json"), result)
    _draw(runs, path.with_suffix(".png"))
    print(path.with_suffix(".json"))
    print(path.with_suffix(".png"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train",
        description="Trains models side by side, on the same text and the same number of tokens.",
    )
    parser.add_argument(
        "--presets",
        nargs="+",
        choices=list(PRESETS),
        default=DEFAULT_PRESETS,
        metavar="PRESET",
        help=f"of: {', '.join(PRESETS)} (default: {', '.join(DEFAULT_PRESETS)})",
    )
    parser.add_argument(
        "--tokens", type=report.positive, help="tokens for each (default: the first preset's)"
    )
    parser.add_argument(
        "--threads", type=report.positive, help="CPU threads (default: torch's own)"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU if there is one that the build has kernels for (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=(),
        metavar="PATH",
        help="files, directories, globs (default: Python's standard library)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change one setting of every preset, such as train.seed=1; may be repeated",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=sources.RESULTS,
        metavar="DIRECTORY",
        help="where the JSON and the picture go (default: benchmarks/results)",
    )
    return parser


def _configs(options: argparse.Namespace) -> list[RunConfig]:
    """The presets with the command line's changes; HopeError where they cannot be compared."""
    configs = [override(preset(name), options.set) for name in options.presets]
    tokens = options.tokens or configs[0].train.tokens
    configs = [replace(c, train=replace(c.train, tokens=tokens)) for c in configs]
    for config in configs:
        for name in SHARED:
            first, own = getattr(configs[0].train, name), getattr(config.train, name)
            if own != first:
                raise HopeError(
                    f"{config.preset} and {configs[0].preset} cannot be compared: train.{name} is "
                    f"{own} and {first}; --set train.{name}=... makes them equal"
                )
    return configs


def _train(config: RunConfig, corpus: Corpus, device: str) -> dict[str, Any]:
    """Trains one model in a temporary directory; returns its figures and its curves.

    KeyboardInterrupt: it was stopped, and its figures are not those of the whole budget.
    """
    print(f"training {config.preset}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        result = Trainer(config, corpus, Path(folder) / "run", device).run()
        lines = result.files["metrics"].read_text().splitlines()
    if result.signal is not None:
        raise KeyboardInterrupt
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


def _table(runs: Sequence[dict[str, Any]]) -> str:
    header = ("preset", "parameters", "tokens", "validation bits/byte", "seconds", "tokens/s")
    rows = [
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
    return report.table(header, rows)


def _draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Two panels: bits per byte against tokens, and against seconds of training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, over in zip(panels, ("tokens", "seconds"), strict=True):
        for index, run in enumerate(runs):
            color = f"C{index}"
            training, validation = run["training"], run["validation"]
            axes.plot(
                training[over], training["bits_per_byte"], color=color, linewidth=0.5, alpha=0.4
            )
            axes.plot(
                validation[over],
                validation["bits_per_byte"],
                color=color,
                marker="o",
                markersize=4,
                label=f"{run['preset']}, {run['parameters'] / 1e6:.2f} M parameters",
            )
        axes.set(xlabel=f"{over} of training")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="bits per byte (line with dots: validation)")
    panels[0].legend()
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
