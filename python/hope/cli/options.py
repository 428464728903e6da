"""What commands share: options, and where runs are."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from hope.config import DataConfig, RunConfig, override, to_dict
from hope.data import corpus_tokenizer
from hope.errors import HopeError

Commands = "argparse._SubParsersAction[argparse.ArgumentParser]"
_RUNS = Path("runs")
_SOURCES = "files, directories, globs, .jsonl, .parquet, data sets"


def add_source(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """The options that say where documents are."""
    default = "" if required else " (default: Python's standard library)"
    parser.add_argument(
        "--data",
        nargs="+",
        default=(),
        required=required,
        metavar="PATH",
        help=f"text: {_SOURCES}{default}",
    )
    parser.add_argument(
        "--field",
        default=DataConfig.field,
        help="where JSON lines, Parquet files and data sets hold it (default: %(default)s)",
    )


def source(options: argparse.Namespace) -> DataConfig:
    return DataConfig(paths=tuple(options.data), field=options.field)


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="a tokenizer.json, as hope tokenizer writes it (default: bytes)",
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The options that change a preset's settings."""
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help=f"text to train on: {_SOURCES}, shards (default: Python's standard library)",
    )
    add_tokenizer(parser)
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--tokens", type=positive, help="how many tokens (bytes) to train on")
    budget.add_argument("--steps", type=positive, help="the same, in optimizer steps")
    add_set(parser)


def add_set(parser: argparse.ArgumentParser, help: str = "change one setting") -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help=f"{help}; may be repeated",
    )


def add_place(parser: argparse.ArgumentParser, name: str, what: str) -> None:
    """Where `what` goes, of which runs/NAME is the usual place: --out and --resume."""
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIRECTORY",
        help=f"where the files go (default: runs/{name}, or runs/{name}-2, ... if it is taken)",
    )
    parser.add_argument(
        "--resume", action="store_true", help=f"continue {what} in --out (default: the latest)"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU if there is one that the build has kernels for (default: %(default)s)",
    )


def add_judged(parser: argparse.ArgumentParser, task: str) -> None:
    """The options of what judges a trained run: run, --batch, --out and --device."""
    parser.add_argument(
        "run", type=Path, help="the directory of a run, or of one of its checkpoints"
    )
    parser.add_argument(
        "--batch",
        type=positive,
        default=16,
        help="how many texts are read side by side (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"where the figures go, as JSON (default: {task}.json in RUN)",
    )
    add_device(parser)


def judged_out(options: argparse.Namespace, task: str) -> Path:
    """Where the figures go; HopeError now rather than after hours if that cannot be."""
    out = options.out or options.run / f"{task}.json"
    if not out.parent.is_dir():
        raise HopeError(f"there is no directory {out.parent} to write {out.name} into")
    if out.is_dir():
        raise HopeError(f"--out: {out} is a directory, and must be a file")
    return out


def positive(text: str) -> int:
    """A count such as 3000000, 3_000_000 or 3e6."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < 2**63 or not value.is_integer():
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(value)


def configured(options: argparse.Namespace, config: RunConfig) -> RunConfig:
    """`config` with what the command line asks for."""
    config = override(config, options.set)
    if options.tokens is not None:
        config = override(config, [f"train.tokens={options.tokens}"])
    if options.steps is not None:
        tokens = options.steps * config.train.tokens_per_step
        config = override(config, [f"train.tokens={tokens}"])
    data = config.data
    if options.data is not None:
        data = dataclasses.replace(data, paths=tuple(options.data))
    if options.tokenizer is not None:
        data = dataclasses.replace(data, tokenizer=options.tokenizer)
    config = dataclasses.replace(config, data=data)
    if not any(assignment.startswith("model.vocab_size=") for assignment in options.set):
        config = _with_vocabulary(config)
    return config


def _with_vocabulary(config: RunConfig) -> RunConfig:
    """`config` with a vocabulary, a multiple of 8, that the tokenizer of its data fits into."""
    needed = corpus_tokenizer(config.data).vocab_size
    if needed <= config.model.vocab_size:
        return config
    return override(config, [f"model.vocab_size={needed + -needed % 8}"])


def refuse_changes(saved: RunConfig, asked: RunConfig) -> None:
    if changes := _differences(to_dict(saved), to_dict(asked)):
        raise HopeError(f"a resumed run keeps its settings, but these differ: {', '.join(changes)}")


def _differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    found = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{path}{name}.")
        elif before != after:
            found.append(f"{path}{name} ({before} in the run, {after} asked for)")
    return found


def new_run(name: str) -> Path:
    number = 1
    while _is_used(_numbered_run(name, number)):
        number += 1
    return _numbered_run(name, number)


def latest_run(name: str) -> Path:
    number = 1
    while _is_used(_numbered_run(name, number + 1)):
        number += 1
    return _numbered_run(name, number)


def _numbered_run(name: str, number: int) -> Path:
    return _RUNS / (name if number == 1 else f"{name}-{number}")


def _is_used(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))
