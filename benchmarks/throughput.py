"""Training throughput over the length of the texts: memories against a Transformer.

    python -m benchmarks.throughput --threads 1
    python -m benchmarks.throughput --draw RESULT.json ANOTHER.json    (a picture of both)

A step is all that training does: forward, backward, clipping, AdamW, on a batch of random tokens.
The Transformer, BASELINE, attends with torch's fused kernel. At every length the presets' steps are
timed in turns, one of each after the other, and the ratios are those within a turn. The first turn,
which also finds the peak of the memory, warms up; where it takes longer than `--turn-seconds` all
others would take too long, and it is what counts.

What would not fit is left out, and the table says why: a step that may take longer than
`--step-seconds`, judged by the length before (time grows at most with the length's square), or more
memory than there is (it grows with the length), or that fails for want of memory.

Also on the process's own clock: where other processes take turns on the cores, `cpu_seconds` of one
thread tell more than the wall's, and they decide who is faster.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hope import HopeError, RunConfig, preset
from hope.config import override
from hope.device import choose_device
from hope.model import parameter_count
from hope.plot import plot_speeds
from hope.profile import TrainingStep

from benchmarks import command, measure, report, sources
from benchmarks.evidence import BASELINE, DEFAULT_PRESETS, LARGE, same_size
from benchmarks.measure import Pace

LENGTHS = (1024, 4096, 16384, 65536)
WARM_UP_TOKENS = 64
METHOD = {
    "cpu": "growth of the resident set's peak (VmHWM, reset through clear_refs) during the first "
    "step of a length, gradients and the optimizer's state included, in the process that all run "
    "in, after a step with a few tokens",
    "cuda": "growth of torch.cuda.max_memory_allocated during the first step of a length, "
    "gradients and the optimizer's state included",
}


@dataclass
class Contestant:
    """A preset and what was found of it. `last`: its length, seconds of a step and bytes before."""

    config: RunConfig
    last: tuple[int, float, int | None] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def step(self, tokens: int, device: str) -> TrainingStep:
        sized = override(self.config, [f"train.sequence={tokens}"])
        return TrainingStep(sized, device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0 or 2 (wrong use)."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(words)
    if options.draw:
        return draw(options.draw, parser)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        device = choose_device(options.device).type
        changes = [*(LARGE if options.large else ()), *options.set, f"train.batch={options.batch}"]
        configs = same_size([override(preset(name), changes) for name in options.presets])
    except HopeError as error:
        parser.error(str(error))
    contestants = [Contestant(config) for config in configs]
    neighbours = report.Neighbours()
    path = sources.dated(options.out, f"throughput-{device}").with_suffix(".json")
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = "cpu_speed_ratio" if alone else "speed_ratio"
    result: dict[str, Any] = {
        "benchmark": "throughput",
        "command": shlex.join(["python", "-m", "benchmarks.throughput", *words]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "environment": report.environment(device),
        "memory": METHOD[device] if measure.can_measure_memory(device) else "not measured",
        "parameters": {c.config.preset: parameter_count(c.config.model) for c in contestants},
        "baseline": BASELINE,
        "crossovers_by": clock,
    }
    for tokens in sorted(options.lengths):
        _turns(contestants, tokens, device, options)
        rows = [row for contestant in contestants for row in contestant.rows]
        machine = neighbours.facts()
        tables = [table(rows, length) for length in sorted({row["tokens"] for row in rows})]
        result |= {
            "neighbours": machine,
            "warning": report.loaded(machine),
            "rows": rows,
            "crossovers": crossovers(rows, clock),
            "table": "\n\n".join(tables).splitlines(),
        }
        sources.write_json(path, result)
        print(f"{tables[-1]}\n", flush=True)
    print("\n".join(result["crossovers"].values()))
    if result["warning"]:
        print(result["warning"], file=sys.stderr)
    print(path)
    return draw([path], parser)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description="Times training steps of presets at growing lengths of the texts.",
    )
    command.add_presets(parser, DEFAULT_PRESETS)
    parser.add_argument(
        "--draw",
        nargs="+",
        type=Path,
        metavar="RESULT",
        help="time nothing: draw what results have, beside the first of them",
    )
    parser.add_argument(
        "--large", action="store_true", help="the sizes of `benchmarks.evidence --large`, for a GPU"
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=report.positive,
        default=LENGTHS,
        metavar="TOKENS",
        help=f"of a text (default: {' '.join(map(str, LENGTHS))})",
    )
    parser.add_argument("--batch", type=report.positive, default=1, help="texts (default: 1)")
    parser.add_argument(
        "--repeats", type=report.positive, default=5, help="turns (default: %(default)s)"
    )
    parser.add_argument(
        "--turn-seconds",
        type=report.positive,
        default=60,
        help="the longest first turn that others follow (default: %(default)s)",
    )
    parser.add_argument(
        "--step-seconds",
        type=report.positive,
        default=300,
        help="a step that may take longer is left out (default: %(default)s)",
    )
    command.add_machine(parser)
    command.add_rest(parser, "model.dim=512", "the JSON and the picture go")
    return parser


# ---- measuring -----------------------------------------------------------------------------------


def _turns(
    contestants: Sequence[Contestant], tokens: int, device: str, options: argparse.Namespace
) -> None:
    """Times everybody at one length; each gets a row, with times or with the reason why not."""
    steps: dict[str, TrainingStep] = {}
    found: dict[str, dict[str, Any]] = {}
    for contestant in contestants:
        name = contestant.config.preset
        row = {"preset": name, "tokens": tokens, "batch": options.batch}
        contestant.rows.append(row)
        if reason := _why_not(contestant, tokens, device, options.step_seconds):
            row["reason"] = reason
            continue
        try:
            contestant.step(min(tokens, WARM_UP_TOKENS), device)()
            step = contestant.step(tokens, device)
            peak, seconds = _first(step, device)
        except torch.OutOfMemoryError as error:
            row["reason"] = f"out of memory: {str(error).splitlines()[0]}"
            continue
        contestant.last = (tokens, seconds["seconds"][0], peak)
        steps[name], found[name] = step, {**row, **seconds, "peak_bytes": peak, "warm": False}
    if sum(facts["seconds"][0] for facts in found.values()) <= options.turn_seconds:
        for facts in found.values():
            facts |= {"seconds": [], "cpu_seconds": [], "warm": True}
        for _ in range(options.repeats):
            for name, step in steps.items():
                for clock, seconds in _timed(step, device).items():
                    found[name][clock] += seconds
    for contestant in contestants:
        if facts := found.get(contestant.config.preset):
            contestant.rows[-1] = _figures(facts, found.get(BASELINE))


def _why_not(contestant: Contestant, tokens: int, device: str, most_seconds: int) -> str | None:
    """Why a step of that length is not tried, by what was seen of the last; None: it is."""
    before = contestant.rows[-2:-1]
    if before and contestant.last is None:
        return before[0]["reason"]
    if contestant.last is None:
        return None
    length, seconds, peak = contestant.last
    factor = tokens / length
    if seconds * factor**2 > most_seconds:
        return (
            f"may take {seconds * factor**2:,.0f} s a step (took {seconds:,.1f} s at {length:,} "
            f"tokens), more than {most_seconds:,} s"
        )
    there = _available_bytes(device)
    if peak is not None and there is not None and peak * factor > there:
        return (
            f"may take {peak * factor / 2**30:,.1f} GiB (took {peak / 2**30:,.2f} GiB at "
            f"{length:,} tokens), and {there / 2**30:,.1f} GiB are free"
        )
    return None


def _available_bytes(device: str) -> int | None:
    """Memory that is free; None where the system does not tell."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def _first(step: TrainingStep, device: str) -> tuple[int | None, dict[str, list[float]]]:
    """The peak of a first step in bytes, None where it cannot be measured, and its times."""
    times: dict[str, list[float]] = {}

    def call() -> None:
        times.update(_timed(step, device))

    if not measure.can_measure_memory(device):
        call()
        return None, times
    peak = measure.peak_on_gpu(call) if device == "cuda" else measure.growth(call)
    return peak, times


def _timed(step: TrainingStep, device: str) -> dict[str, list[float]]:
    """One step's seconds, on the wall's clock (a GPU's own) and on the process's."""
    start = time.process_time()
    seconds = measure.seconds_per_call(step, Pace(1), device)
    return {"seconds": [seconds], "cpu_seconds": [time.process_time() - start]}


def _figures(facts: dict[str, Any], baseline: dict[str, Any] | None) -> dict[str, Any]:
    """A row: the samples, their median, and ratios to the baseline's of the same turn."""
    tokens = facts["batch"] * facts["tokens"]
    median = statistics.median(facts["seconds"])
    row = {
        **facts,
        "median_seconds": median,
        "tokens_per_second": tokens / median,
        "tokens_per_cpu_second": tokens / statistics.median(facts["cpu_seconds"]),
    }
    if baseline is not None:
        for clock, name in (("seconds", "speed_ratio"), ("cpu_seconds", "cpu_speed_ratio")):
            turns = zip(facts[clock], baseline[clock], strict=True)
            row[name] = statistics.median(theirs / ours for ours, theirs in turns)
    return row


# ---- the result ----------------------------------------------------------------------------------


def crossovers(rows: Sequence[dict[str, Any]], clock: str) -> dict[str, str]:
    """For each preset but the baseline a sentence: from which length on it trains faster.

    clock: the rows' ratio that says so.
    """
    found = {}
    for name in dict.fromkeys(row["preset"] for row in rows):
        own = [row for row in rows if row["preset"] == name and clock in row]
        if name == BASELINE or not own:
            continue
        slower = [row["tokens"] for row in own if row[clock] <= 1]
        faster = [row["tokens"] for row in own if row["tokens"] > max(slower, default=0)]
        if faster:
            found[name] = f"{name}: faster than {BASELINE} from {min(faster):,} tokens on"
        else:
            last = own[-1]
            found[name] = (
                f"{name}: slower than {BASELINE} up to {last['tokens']:,} tokens "
                f"({last[clock]:.2f} times its speed there)"
            )
    return found


def draw(results: Sequence[Path], parser: argparse.ArgumentParser) -> int:
    """One picture of results, beside the first: of the clock that decides who is faster."""
    rows, clocks = [], set()
    for path in results:
        try:
            result = json.loads(path.read_text())
            rows += result["rows"]
            clocks.add(result.get("crossovers_by", "cpu_speed_ratio"))  # older ones do not say it
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--draw: cannot read {path}: {error}")
    if len(clocks) > 1:
        parser.error("--draw: these results go by different clocks")
    by_cpu = clocks == {"cpu_speed_ratio"}
    picture = results[0].with_suffix(".png")
    plot_speeds(rows, "tokens_per_cpu_second" if by_cpu else "tokens_per_second", picture)
    print(picture)
    return 0


def table(rows: Sequence[dict[str, Any]], tokens: int) -> str:
    """One length's rows as aligned text."""
    header = (
        *(f"{tokens:,} tokens", "turns", "ms a step", "tokens/s", f"x {BASELINE}"),
        *("tokens/CPU s", "x on it", "peak MiB"),
    )
    lines: list[tuple[str, ...]] = []
    for row in (row for row in rows if row["tokens"] == tokens):
        if "reason" in row:
            lines.append((row["preset"], row["reason"]))
            continue
        speed, cpu_speed = (
            f"{row[f'{clock}speed_ratio']:.2f}" if f"{clock}speed_ratio" in row else "-"
            for clock in ("", "cpu_")
        )
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"
        lines.append(
            (
                row["preset"],
                str(len(row["seconds"])),
                f"{1e3 * row['median_seconds']:,.0f}",
                f"{row['tokens_per_second']:,.0f}",
                speed,
                f"{row['tokens_per_cpu_second']:,.0f}",
                cpu_speed,
                peak,
            )
        )
    return report.table(header, lines)


if __name__ == "__main__":
    sys.exit(main())
