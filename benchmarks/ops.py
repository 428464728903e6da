"""Times an operator against its definition and against other people's code.

    python -m benchmarks.ops --op titans

Rows of a contest are timed in turns, in one process; each is also compared with the roof that is
measured among them (see measure.py). A table's last column, "x reference" say, is how many times as
fast as the row reference a row is. Nothing is timed before the operator has been compared with its
float64 definition, forward and backward: if that is red, the command prints what differs and exits
with 1. The table and every raw sample go into one JSON file.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hope.device import choose_device
from hope.errors import HopeError

from benchmarks import check, measure, peers, report, titans
from benchmarks.measure import Call, Roof, Samples
from benchmarks.subjects import PASSES, TRAINING, Contest, Operator, Row, Setting, Subject

OPERATORS = {operator.stem: operator for operator in (titans.BENCHMARK,)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUICK_REPEATS = 2
PROFILED_CALLS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0, 1 (the operator is wrong) or 2 (wrong use)."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(words)
    try:
        device = choose_device(options.device).type
    except HopeError as error:
        parser.error(str(error))
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    operator = OPERATORS[options.op]
    settings = _settings(parser, options, operator, device)
    checks = {}
    for setting in settings:
        checks[str(setting)] = errors = check.errors(
            operator.run, operator.check_arguments(setting)
        )
        if red := [error for error in errors if error.red]:
            print(f"{operator.stem}, {setting}: WRONG, so nothing is timed", file=sys.stderr)
            for error in red:
                print(
                    f"  {error.name}: error {error.error:.3g} against the float64 definition, "
                    f"{error.allowed:.3g} allowed",
                    file=sys.stderr,
                )
            return 1
    if options.profile:
        _profile(operator, settings, device, options.out or report.SCRATCH)
        return 0
    neighbours = report.Neighbours()
    with_memory = not options.quick and measure.can_measure_memory(device)
    results, tables = [], []
    for setting in settings:
        rows = _measure(operator, setting, options.repeats, with_memory)
        results += rows
        tables.append(_table(operator, setting, rows))
        print(f"{tables[-1]}\n", flush=True)
    machine = neighbours.facts()
    warning = report.loaded(machine)
    if warning:
        print(warning, file=sys.stderr)
    result = {
        "benchmark": "ops",
        "op": operator.stem,
        "command": shlex.join(["python", "-m", "benchmarks.ops", *words]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "environment": report.environment(device, operator.stem),
        "neighbours": machine,
        "warning": warning,
        "peers": {
            peer: {"pinned": version, "installed": peers.installed(peer)}
            for peer, version in peers.pinned().items()
        },
        "roofs": {roof.name: roof.definition for roof in measure.ROOFS[device]},
        "memory": measure.MEMORY_METHOD[device] if with_memory else "not measured",
        "checks": {where: [vars(error) for error in errors] for where, errors in checks.items()},
        "rows": results,
        "table": "\n\n".join(tables).splitlines(),
    }
    out = options.out or (report.SCRATCH if options.quick else report.RESULTS)
    path = report.dated(out, f"{operator.stem}-{device}").with_suffix(".json")
    report.write_json(path, result)
    print(path)
    return 0


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
        help="instead of timing, write traces of our rows for a trace viewer",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIRECTORY",
        help="where the JSON goes (default: benchmarks/results; with --quick or --profile "
        "build/benchmarks)",
    )
    return parser


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


# ---- measuring -----------------------------------------------------------------------------------


def _measure(
    operator: Operator, setting: Setting, repeats: int, with_memory: bool
) -> list[dict[str, Any]]:
    """Every contest and pass at a setting; one dict for each row, the roofs included."""
    roofs = {roof: roof.prepare() for roof in measure.ROOFS[setting.device]}
    rows = []
    for contest in operator.contests:
        for direction in PASSES:
            found = _hold(contest, direction, setting, repeats, roofs)
            for row in contest.rows if with_memory else ():
                if "reason" not in found[row.name]:
                    small = replace(setting, shape=operator.quick(setting.shape))
                    found[row.name]["peak_bytes"] = measure.peak_memory(
                        row, setting, direction, small
                    )
            where = {"shape": setting.shape, "dtype": str(setting.dtype).removeprefix("torch.")}
            rows += [
                {**where, "contest": contest.name, "pass": direction, "row": name, **facts}
                for name, facts in found.items()
            ]
    return rows


def _hold(
    contest: Contest, direction: str, setting: Setting, repeats: int, roofs: dict[Roof, Call]
) -> dict[str, dict[str, Any]]:
    """Times the rows of a contest and the roofs, in turns; returns what was found by name."""
    device = setting.device
    calls = {roof.name: call for roof, call in roofs.items()}
    counts = {name: measure.warm_up(call, device) for name, call in calls.items()}
    found: dict[str, dict[str, Any]] = {name: {} for name in calls}
    subjects: dict[str, Subject] = {}
    for row in contest.rows:
        found[row.name] = {}
        prepared = _prepare(row, setting, direction)
        if isinstance(prepared, str):
            found[row.name]["reason"] = prepared
        else:
            subjects[row.name], counts[row.name] = prepared
            calls[row.name] = subjects[row.name].call(direction)
    samples = measure.in_turns(calls, counts, repeats, device)
    of_roofs = {roof: samples[roof.name] for roof in roofs}
    for roof in roofs:
        found[roof.name] = _times(samples[roof.name], roof.work.flops, roof.work.bytes)
    for name, subject in subjects.items():
        mine, work = samples[name], subject.work[direction]
        facts = _times(mine, work.flops, work.bytes)
        facts["tokens_per_second"] = subject.tokens / mine.median
        facts["percent_of_roof"] = 100 * measure.least_seconds(work, of_roofs) / mine.median
        if contest.baseline in subjects:
            facts["speed_ratio"] = measure.ratio(mine, samples[contest.baseline])
            facts["speed_ratio_to"] = contest.baseline
        found[name] = facts
    return found


def _prepare(row: Row, setting: Setting, direction: str) -> tuple[Subject, int] | str:
    """A row's subject, warm, and its calls per sample; or the reason why it cannot be timed."""
    if row.peer is not None and (reason := peers.why_not(row.peer)):
        return reason
    try:
        subject = row.prepare(setting)
        return subject, measure.warm_up(subject.call(direction), setting.device)
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:
        if row.peer is None:
            raise
        return f"fails: {type(error).__name__}: {error}"


def _times(samples: Samples, flops: int | None, moved: int | None) -> dict[str, Any]:
    low, high = samples.quartiles
    return {
        "median_ms": 1e3 * samples.median,
        "quartiles_ms": [1e3 * low, 1e3 * high],
        "gflop_per_second": flops / samples.median / 1e9 if flops else None,
        "gb_per_second": moved / samples.median / 1e9 if moved else None,
        "samples_ms": [1e3 * seconds for seconds in samples.seconds],
        "calls_per_sample": samples.calls,
    }


# ---- showing -------------------------------------------------------------------------------------


def _table(operator: Operator, setting: Setting, rows: Sequence[dict[str, Any]]) -> str:
    on_gpu = setting.device == "cuda"
    threads = "" if on_gpu else f", {torch.get_num_threads()} threads"
    parts = [f"{operator.stem}  {setting}  {setting.device}{threads}"]
    for contest in operator.contests:
        for direction in PASSES:
            mine = [r for r in rows if r["contest"] == contest.name and r["pass"] == direction]
            header = [f"{contest.name}, {direction}", "ms", "quartiles", "tokens/s"]
            header += ["TFLOP/s", "GB/s"] if on_gpu else ["GFLOP/s"]
            header += ["% of roof", "peak MiB", f"x {contest.baseline}"]
            parts.append(report.table(header, [_cells(row, on_gpu) for row in mine]))
    return "\n\n".join(parts)


def _cells(row: dict[str, Any], on_gpu: bool) -> list[str]:
    if "reason" in row:
        return [row["row"], row["reason"]]

    def shown(key: str, form: str, scale: float = 1) -> str:
        value = row.get(key)
        return "-" if value is None else format(value / scale, form)

    low, high = row["quartiles_ms"]
    cells = [row["row"], shown("median_ms", ".3f"), f"{low:.3f}..{high:.3f}"]
    cells.append(shown("tokens_per_second", ",.0f"))
    if on_gpu:
        cells += [shown("gflop_per_second", ".1f", 1e3), shown("gb_per_second", ",.0f")]
    else:
        cells.append(shown("gflop_per_second", ".2f"))
    cells += [shown("percent_of_roof", ".1f"), shown("peak_bytes", ",.1f", 2**20)]
    return [*cells, shown("speed_ratio", ".2f")]


def _profile(operator: Operator, settings: list[Setting], device: str, out: Path) -> None:
    """Traces forward+backward of our rows, shows the costliest calls, and writes the traces."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    out.mkdir(parents=True, exist_ok=True)
    for number, setting in enumerate(settings, 1):
        for contest in operator.contests:
            (row,) = (row for row in contest.rows if row.name == "ours")
            call = row.prepare(setting).call(TRAINING)
            measure.warm_up(call, device)
            with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
                for _ in range(PROFILED_CALLS):
                    call()
            by = f"self_{device}_time_total"
            print(f"{operator.stem}  {setting}  {device}: {contest.name}, {TRAINING}")
            print(profile.key_averages().table(sort_by=by, row_limit=15))
            path = out / f"{operator.stem}-{device}-{contest.name}-{number}.trace.json"
            profile.export_chrome_trace(str(path))
            print(path)


if __name__ == "__main__":
    sys.exit(main())
