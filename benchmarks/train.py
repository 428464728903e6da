"""Trains models side by side: the same text in the same order, and the same number of tokens.

    python -m benchmarks.train

One after the other, through `hope.Trainer`. Every model's bits per byte against tokens and against
seconds of training go into one JSON file and one picture.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hope import (
    Corpus,
    HopeError,
    RunConfig,
    Trainer,
    TrainingDiverged,
    load_corpus,
    preset,
)
from hope.compare import comparable, figures, table
from hope.config import override
from hope.device import choose_device
from hope.plot import plot_runs

from benchmarks import command, report, sources

DEFAULT_PRESETS = ("tiny", "tiny-transformer", "tiny-conv-attention")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0, 1 (a training diverged), 2 (wrong use) or 130 (stopped)."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(words)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        device = choose_device(options.device).type
        configs = [override(preset(name), options.set) for name in options.presets]
        configs = comparable(configs, options.tokens)
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
    shown = table(runs)
    print(f"\n{shown}\n")
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
        "table": shown.splitlines(),
    }
    path = sources.dated(options.out, f"train-{device}")
    sources.write_json(path.with_suffix(".json"), result)
    plot_runs(runs, path.with_suffix(".png"))
    print(path.with_suffix(".json"))
    print(path.with_suffix(".png"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train",
        description="Trains models side by side, on the same text and the same number of tokens.",
    )
    command.add_presets(parser, DEFAULT_PRESETS)
    parser.add_argument(
        "--tokens", type=report.positive, help="tokens for each (default: the first preset's)"
    )
    command.add_machine(parser)
    command.add_data(parser)
    command.add_rest(parser, "train.seed=1", "the JSON and the picture go")
    return parser


def _train(config: RunConfig, corpus: Corpus, device: str) -> dict[str, Any]:
    """Trains one model in a temporary directory; returns its figures and its curves.

    KeyboardInterrupt: it was stopped, and its figures are not those of the whole budget.
    """
    print(f"training {config.preset}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        result = Trainer(config, corpus, Path(folder) / "run", device).run()
        if result.signal is not None:
            raise KeyboardInterrupt
        return figures(config, result)


if __name__ == "__main__":
    sys.exit(main())
