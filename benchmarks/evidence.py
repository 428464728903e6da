"""A small Table 1: presets of one size on the same text, over several seeds.

    python -m benchmarks.evidence --work runs/evidence --threads 1

Seed by seed, and in a seed preset by preset, through `hope.compare.Comparison` in a directory of
its own: what is stopped goes on when the same command is given again, and a finished run is only
read. Within a seed all presets read the same batches in the same order. After every seed the
figures so far are in `WORK/evidence.json`, a table and a picture; at the end they also are where
results go.
"""

from __future__ import annotations

import argparse
import datetime
import math
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hope import Corpus, HopeError, RunConfig, TrainingDiverged, load_corpus, preset
from hope.cli.options import refuse_changes
from hope.compare import Comparison, comparable, load_comparison
from hope.config import override
from hope.device import choose_device
from hope.model import parameter_count
from hope.plot import plot_bands

from benchmarks import command, report, sources

DEFAULT_PRESETS = ("hope-tiny-cms", "hope-tiny", "tiny", "hope-attention-tiny", "tiny-transformer")
BASELINE = "tiny-transformer"
TOKENS = 1_000_000
SEEDS = (0, 1, 2)
VALIDATIONS = 5  # on the way, the last at the end
POINTS = 100  # of a training curve that a result keeps
SPREAD = 0.03  # by which a model's size may differ from the first one's

# The same models at about 40 million parameters, for a GPU, whose kernels want the widths of a
# continuum memory system's MLPs to be multiples of 16; `--set` may change any of it.
LARGE = (
    *("model.dim=512", "model.layers=12", "model.mlp_ratio=3.75"),
    *("model.mixer.heads=8", "model.mixer.head_dim=64"),
    *("train.batch=32", "train.sequence=1024", "train.lr=1e-3", "train.dtype=bfloat16"),
    *("train.warmup=0.02", "train.lr_final=0.1", "train.validation_tokens=1048576"),
)
LARGE_TOKENS = 500_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0, 1 (a training diverged), 2 (wrong use) or 130 (stopped)."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(words)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    neighbours = report.Neighbours()
    command = shlex.join(["python", "-m", "benchmarks.evidence", *words])
    runs: list[dict[str, Any]] = []
    try:
        device = choose_device(options.device).type
        seeds = {seed: _configs(options, seed) for seed in options.seeds}
        first = seeds[options.seeds[0]][0]
        corpus = load_corpus(first.data, window=first.train.sequence)
        print(f"data  {corpus.description}", flush=True)
        for seed, configs in seeds.items():
            print(f"seed  {seed}", flush=True)
            done = _compare(configs, corpus, options.work / f"seed-{seed}", device)
            if done is None:
                print("stopped; the same command goes on from here", file=sys.stderr)
                return 130
            runs += [{"seed": seed, **_thinned(run)} for run in done]
            result = _result(command, device, corpus, runs, neighbours)
            _write(result, options.work / "evidence")
            print("\n" + "\n".join(result["table"]) + "\n", flush=True)
    except HopeError as error:
        parser.error(str(error))
    except TrainingDiverged as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    if result["warning"]:
        print(result["warning"], file=sys.stderr)
    path = sources.dated(options.out, f"evidence-{device}")
    _write(result, path)
    print(path.with_suffix(".json"))
    print(path.with_suffix(".png"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description="Trains presets of one size on the same text, with several seeds each.",
    )
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        metavar="DIRECTORY",
        help="where the runs are kept, so that a stopped benchmark can go on",
    )
    command.add_presets(parser, DEFAULT_PRESETS)
    parser.add_argument(
        "--seeds", nargs="+", type=_seed, default=SEEDS, metavar="SEED", help="default: 0 1 2"
    )
    parser.add_argument(
        "--tokens",
        type=report.positive,
        help=f"tokens for each run (default: {TOKENS:,}, with --large {LARGE_TOKENS:,})",
    )
    parser.add_argument(
        "--large",
        action="store_true",
        help=f"about 40 million parameters, for a GPU: {' '.join(LARGE)}",
    )
    command.add_machine(parser)
    command.add_data(parser)
    command.add_rest(parser, "train.batch=4", "the JSON and the picture go")
    return parser


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or above, not {text!r}")
    return int(text)


# ---- the runs ------------------------------------------------------------------------------------


def _configs(options: argparse.Namespace, seed: int) -> list[RunConfig]:
    """The runs of one seed: comparable, and of one size."""
    changes = [*(LARGE if options.large else ()), *options.set, f"train.seed={seed}"]
    tokens = options.tokens or (LARGE_TOKENS if options.large else TOKENS)
    configs = comparable([override(preset(n), changes) for n in options.presets], tokens)
    configs = [replace(c, data=replace(c.data, paths=tuple(options.data))) for c in configs]
    every = math.ceil(configs[0].train.steps / VALIDATIONS)
    return same_size([override(c, [f"train.validate_every={every}"]) for c in configs])


def same_size(configs: Sequence[RunConfig]) -> list[RunConfig]:
    """The configs, the MLPs of those that differ by more than SPREAD from the first made to fit.

    A width of the MLP makes up for what the mixers hold, as in the presets: `model.mlp_ratio`, in
    eighths. HopeError where none does.
    """
    aim = parameter_count(configs[0].model)
    fitted = [c if _spread(c, aim) <= SPREAD else _fitted(c, aim) for c in configs]
    for config in fitted:
        if _spread(config, aim) > SPREAD:
            raise HopeError(
                f"no width of the MLP gives {config.preset} the {aim:,} parameters of "
                f"{configs[0].preset} within {SPREAD:.0%}; the nearest has "
                f"{parameter_count(config.model):,}"
            )
    return fitted


def _spread(config: RunConfig, aim: int) -> float:
    return abs(parameter_count(config.model) / aim - 1)


def _fitted(config: RunConfig, aim: int) -> RunConfig:
    """The config with the `mlp_ratio`, at least an eighth, whose size is nearest to `aim`."""
    ratio, size = config.model.mlp_ratio, parameter_count(config.model)
    wider = override(config, [f"model.mlp_ratio={ratio + 1}"])
    slope = parameter_count(wider.model) - size  # sizes are linear in the width
    eighths = max(1, round(8 * (ratio + (aim - size) / slope)))
    return override(config, [f"model.mlp_ratio={eighths / 8}"])


def _compare(
    configs: Sequence[RunConfig], corpus: Corpus, work: Path, device: str
) -> list[dict[str, Any]] | None:
    """Trains one seed's runs, or the rest of them; their figures, or None if it was stopped."""
    resume = (work / "compare.json").is_file()
    if resume:
        saved = load_comparison(work)
        names, asked = ([c.preset for c in runs] for runs in (saved, configs))
        if names != asked:
            raise HopeError(f"{work} holds runs of {' '.join(names)}, not of {' '.join(asked)}")
        for before, now in zip(saved, configs, strict=True):
            refuse_changes(before, now)
    comparison = Comparison(configs, corpus, work, device, resume=resume)
    return comparison.runs if comparison.run() is None else None


# ---- the result ----------------------------------------------------------------------------------


def _thinned(run: dict[str, Any]) -> dict[str, Any]:
    """A run's figures with means of at most POINTS stretches as its training curve."""
    curve = run["training"]
    count = len(curve["tokens"])
    ends = [count * (i + 1) // min(POINTS, count) for i in range(min(POINTS, count))]
    starts = [0, *ends[:-1]]
    losses = curve["bits_per_byte"]
    thin = {
        "tokens": [curve["tokens"][end - 1] for end in ends],
        "seconds": [curve["seconds"][end - 1] for end in ends],
        "bits_per_byte": [
            round(statistics.fmean(losses[start:end]), 4)
            for start, end in zip(starts, ends, strict=True)
        ],
    }
    return {**run, "training": thin}


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each preset, over its seeds: bits per byte, how far they are from BASELINE's of the same
    seed (where that was trained), and seconds of training.

    A spread is the standard deviation of a sample; None with one seed.
    """
    baseline = {r["seed"]: r["validation_bits_per_byte"] for r in runs if r["preset"] == BASELINE}
    rows = []
    for name in dict.fromkeys(run["preset"] for run in runs):
        own = [run for run in runs if run["preset"] == name]
        bits = [run["validation_bits_per_byte"] for run in own]
        differences = [
            run["validation_bits_per_byte"] - baseline[run["seed"]] for run in own if baseline
        ]
        rows.append(
            {
                "preset": name,
                "parameters": own[0]["parameters"],
                "tokens": own[0]["tokens"],
                "seeds": [run["seed"] for run in own],
                "bits_per_byte": {**_spread_of(bits), "min": min(bits), "max": max(bits)},
                "against_baseline": _spread_of(differences) if differences else None,
                "seconds": _spread_of([run["seconds"] for run in own]),
            }
        )
    return rows


def _spread_of(values: Sequence[float]) -> dict[str, float | None]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The summary as aligned text."""
    header = ("preset", "parameters", "tokens", "seeds", "validation bits/byte", "min", "max")
    return report.table(
        (*header, f"against {BASELINE}", "seconds"),
        [
            (
                row["preset"],
                f"{row['parameters']:,}",
                f"{row['tokens']:,}",
                str(len(row["seeds"])),
                _plus_minus(row["bits_per_byte"], ".4f"),
                f"{row['bits_per_byte']['min']:.4f}",
                f"{row['bits_per_byte']['max']:.4f}",
                _plus_minus(row["against_baseline"], "+.4f"),
                _plus_minus(row["seconds"], ",.0f"),
            )
            for row in rows
        ],
    )


def _plus_minus(spread: dict[str, float | None] | None, form: str) -> str:
    if spread is None:
        return "-"
    deviation = spread["deviation"]
    mean = f"{spread['mean']:{form}}"
    return mean if deviation is None else f"{mean} ± {deviation:{form.lstrip('+')}}"


def _result(
    command: str,
    device: str,
    corpus: Corpus,
    runs: Sequence[dict[str, Any]],
    neighbours: report.Neighbours,
) -> dict[str, Any]:
    machine, rows = neighbours.facts(), summary(runs)
    return {
        "benchmark": "evidence",
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "environment": report.environment(device),
        "neighbours": machine,  # of the command's last call, where it was resumed
        "warning": report.loaded(machine),
        "corpus": {
            "training_tokens": len(corpus.train),
            "validation_tokens": len(corpus.validation),
            "fingerprint": corpus.fingerprint,
        },
        "runs": list(runs),
        "summary": rows,
        "table": table(rows).splitlines(),
    }


def _write(result: dict[str, Any], path: Path) -> None:
    sources.write_json(path.with_suffix(".json"), result)
    plot_bands(result["runs"], path.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
