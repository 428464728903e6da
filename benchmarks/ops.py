"""Times an operator against its definition and against other people's code.

    python -m benchmarks.ops --op titans

Rows of a contest are timed in turns, in one process; each is also compared with the roof that is
measured among them (see measure.py): the larger of the times that its bytes and its operations need
there. A table's last column, "x reference" say, is how many times as fast as the row reference a
row is. Nothing is timed before the operator has been compared with its float64 definition, forward
and backward: if that is red, the command prints what differs and exits with 1. The tables and every
raw sample go into one JSON file, which is written again after every table.

On a GPU the operator's times are also given as multiples of the bound of the kernels' design: the
backward's is the difference of the two passes', so that it pays for the checkpoints.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import (
    check,
    cms,
    conv,
    measure,
    peers,
    profiling,
    report,
    selfmod,
    sources,
    titans,
    titans_deep,
)
from benchmarks.session import Session
from benchmarks.subjects import Operator, Setting

OPERATORS = {
    operator.name: operator
    for operator in (
        titans.BENCHMARK,
        titans_deep.BENCHMARK,
        selfmod.BENCHMARK,
        selfmod.LINEAR,
        cms.BENCHMARK,
        conv.BENCHMARK,
    )
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUICK_REPEATS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0, 1 (the operator is wrong) or 2 (wrong use)."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    start = time.monotonic()
    parser = _parser()
    options = parser.parse_args(words)
    operator = OPERATORS[options.op]
    device = _device(parser, options, operator)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    settings = _settings(parser, options, operator, device)
    checks = {}
    for setting in settings:
        checks[str(setting)] = errors = _checked(operator, setting)
        if any(error.red for error in errors):
            return 1
    if options.profile:
        profiling.profile(operator, settings, device, options.out or sources.SCRATCH)
        return 0
    neighbours = report.Neighbours()
    deadline = None if options.seconds is None else start + options.seconds
    with_memory = not options.quick and measure.can_measure_memory(device)
    session = Session(operator, device, options.repeats, with_memory, deadline)
    session.compile_peers(settings, options.peer_seconds)
    result = {
        "benchmark": "ops",
        "op": operator.stem,
        "command": shlex.join(["python", "-m", "benchmarks.ops", *words]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "environment": report.environment(device, operator.stem),
        "peers": {
            peer: {"pinned": peers.pinned().get(peer), "installed": peers.installed(peer)}
            for peer in sorted(operator.peers(device))
        },
        "roofs": {roof.name: roof.definition for roof in session.roofs},
        "memory": measure.MEMORY_METHOD[device] if with_memory else "not measured",
        "checks": {where: [vars(error) for error in errors] for where, errors in checks.items()},
    }
    out = options.out or (sources.SCRATCH if options.quick else sources.RESULTS)
    path = sources.dated(out, f"{operator.name}-{device}").with_suffix(".json")
    tables: list[str] = []
    for setting in settings:
        session.measure(setting)
        tables.append(session.table(setting))
        print(f"{tables[-1]}\n", flush=True)
        machine = neighbours.facts()
        result |= {
            "neighbours": machine,
            "warning": report.loaded(machine),
            "rows": session.rows,
            "bounds": session.bounds,
            "clocks": session.clocks,
            "left_out": session.left_out,
            "table": "\n\n".join(tables).splitlines(),
        }
        sources.write_json(path, result)
    if result["warning"]:
        print(result["warning"], file=sys.stderr)
    print(path)
    return 0


def _checked(operator: Operator, setting: Setting) -> list[check.Error]:
    """The operator's errors at a setting; those that are too large are printed."""
    errors = check.errors(operator.run, operator.check_arguments(setting))
    if red := [error for error in errors if error.red]:
        print(f"{operator.name}, {setting}: WRONG, so nothing is timed", file=sys.stderr)
        for error in red:
            print(
                f"  {error.name}: error {error.error:.3g} against the float64 definition, "
                f"{error.allowed:.3g} allowed",
                file=sys.stderr,
            )
    return errors


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops",
        description="Times an operator against its definition and against other people's code.",
    )
    parser.add_argument("--op", choices=list(OPERATORS), default="titans")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU if there is one that the build has kernels for (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=report.positive, help="CPU threads (default: torch's own)"
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="default: float32 on the CPU, bfloat16 on a GPU"
    )
    parser.add_argument(
        "--shape",
        nargs="+",
        metavar="SIZES",
        help="such as 2,1024,4,64,64 for titans' B,T,H,D,C (batch, tokens, heads, head size, "
        "chunk size); several are measured one after the other",
    )
    parser.add_argument(
        "--repeats", type=report.positive, help="samples of every row (default: 15; with --quick 2)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few tokens, few samples, no memory: it shows that everything runs, not how fast",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="instead of timing, write traces of our rows for a trace viewer, and on a GPU ncu's "
        "report",
    )
    parser.add_argument(
        "--seconds",
        type=report.positive,
        help="begin no further contest after that time, and say which were left out",
    )
    parser.add_argument(
        "--peer-seconds",
        type=report.positive,
        default=300,
        help="for peers that compile their kernels, all together (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIRECTORY",
        help="where the JSON goes (default: benchmarks/results; with --quick or --profile "
        "build/benchmarks)",
    )
    return parser


def _device(
    parser: argparse.ArgumentParser, options: argparse.Namespace, operator: Operator
) -> str:
    """The device that the command line asks for, if the operator can be timed there."""
    why_not = None
    if not torch.cuda.is_available():
        why_not = "torch sees no GPU here"
    elif operator.stem not in report.cuda_stems() or "cuda" not in operator.contests:
        why_not = f"{operator.name} has no CUDA kernels in this build"
    if options.device == "cuda" and why_not:
        parser.error(f"--device cuda: {why_not}")
    return "cpu" if options.device == "cpu" or why_not else "cuda"


def _settings(
    parser: argparse.ArgumentParser, options: argparse.Namespace, operator: Operator, device: str
) -> list[Setting]:
    """The settings that the command line asks for, with defaults filled in."""
    if options.repeats is None:
        options.repeats = QUICK_REPEATS if options.quick else 15
    shapes = operator.shapes[device]
    if options.shape:
        shapes = tuple(_sizes(parser, text, operator.letters) for text in options.shape)
    dtype = DTYPES[options.dtype or ("bfloat16" if device == "cuda" else "float32")]
    named = [dict(zip(operator.letters, sizes, strict=True)) for sizes in shapes]
    return [
        Setting(operator.quick(shape) if options.quick else shape, dtype, device) for shape in named
    ]


def _sizes(parser: argparse.ArgumentParser, text: str, letters: str) -> tuple[int, ...]:
    try:
        sizes = tuple(report.positive(part) for part in text.split(","))
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --shape: {text!r}: a size {error}")
    if len(sizes) != len(letters):
        expected = ",".join(letters)
        parser.error(f"argument --shape: expected {len(letters)} sizes {expected}, got {text!r}")
    return sizes


if __name__ == "__main__":
    sys.exit(main())
