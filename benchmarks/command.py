"""The options that benchmarks of whole models share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hope import PRESETS

from benchmarks import report, sources


def add_presets(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    parser.add_argument(
        "--presets",
        nargs="+",
        choices=list(PRESETS),
        default=default,
        metavar="PRESET",
        help=f"of: {', '.join(PRESETS)} (default: {', '.join(default)})",
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Where it runs: --threads and --device."""
    parser.add_argument(
        "--threads", type=report.positive, help="CPU threads (default: torch's own)"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU if there is one that the build has kernels for (default: %(default)s)",
    )


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        nargs="+",
        default=(),
        metavar="PATH",
        help="files, directories, globs (default: Python's standard library)",
    )


def add_rest(parser: argparse.ArgumentParser, example: str, what: str) -> None:
    """Settings of the presets, such as `example`, and where the results go: --set and --out."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help=f"change one setting of every preset, such as {example}; may be repeated",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=sources.RESULTS,
        metavar="DIRECTORY",
        help=f"where {what} (default: benchmarks/results)",
    )
