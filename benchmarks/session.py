"""Holds an operator's contests: who is timed against whom, what follows from it, and the table."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import measure, peers, report
from benchmarks.measure import Call, Pace, Roof, Samples
from benchmarks.subjects import (
    BACKWARD,
    FORWARD,
    PASSES,
    TRAINING,
    Contest,
    Operator,
    Row,
    Setting,
    Subject,
)


class Session:
    """One run of the command: what was measured so far, and why something was not."""

    def __init__(
        self,
        operator: Operator,
        device: str,
        repeats: int,
        with_memory: bool,
        deadline: float | None = None,
    ) -> None:
        self.operator, self.device, self.repeats = operator, device, repeats
        self.with_memory, self.deadline = with_memory, deadline
        self.roofs = measure.roofs_of(device, operator.roofs[device])
        self.rows: list[dict[str, Any]] = []
        self.bounds: list[dict[str, Any]] = []
        self.clocks: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self._not_compiled: dict[peers.Key, str] = {}
        self._roof_calls: dict[Roof, Call] = {}

    def compile_peers(self, settings: Sequence[Setting], seconds: float) -> None:
        """Lets the peers that compile do so ahead, in at most half of the time that is left."""
        if self.deadline is not None:
            seconds = min(seconds, max(1.0, (self.deadline - time.monotonic()) / 2))
        jobs = [
            (row, row.setting(setting))
            for contest in self.operator.contests[self.device]
            for row in contest.rows
            if row.compiles and peers.why_not(row.peer) is None
            for setting in settings
        ]
        if jobs:
            print(f"peers compile their kernels, for {seconds:.0f} s at most", file=sys.stderr)
            self._not_compiled = peers.compile_first(jobs, seconds)

    def measure(self, setting: Setting) -> None:
        """Every contest and pass at a setting: a dict for each row, the roofs included."""
        where = {"shape": setting.shape, "dtype": str(setting.dtype).removeprefix("torch.")}
        for contest in self.operator.contests[self.device]:
            for direction in self.operator.passes:
                name = f"{contest.name}, {direction}"
                if self.deadline is not None and time.monotonic() > self.deadline:
                    self.left_out.append(f"{setting}: {name}: no time left")
                    continue
                found = self._hold(contest, direction, setting)
                here = {**where, "contest": contest.name, "pass": direction}
                if self.device == "cuda":
                    self.clocks.append({**here, "clocks": report.clocks()})
                self.rows += [{**here, "row": row, **facts} for row, facts in found.items()]
        self.bounds += _bounds(self.operator, setting, self.rows_at(setting), self.roofs)

    def rows_at(self, setting: Setting) -> list[dict[str, Any]]:
        dtype = str(setting.dtype).removeprefix("torch.")
        return [r for r in self.rows if r["shape"] == setting.shape and r["dtype"] == dtype]

    def _hold(
        self, contest: Contest, direction: str, setting: Setting
    ) -> dict[str, dict[str, Any]]:
        """Times the rows of a contest and the roofs, in turns; returns what was found by name."""
        if not self._roof_calls:
            self._roof_calls = {roof: roof.prepare() for roof in self.roofs}
        calls = {roof.name: call for roof, call in self._roof_calls.items()}
        paces = {name: measure.warm_up(call, self.device) for name, call in calls.items()}
        found: dict[str, dict[str, Any]] = {name: {} for name in calls}
        subjects: dict[str, Subject] = {}
        for row in contest.rows:
            found[row.name] = {}
            prepared = self._prepare(row, setting, direction)
            if isinstance(prepared, str):
                found[row.name]["reason"] = prepared
            else:
                subjects[row.name], paces[row.name] = prepared
                calls[row.name] = subjects[row.name].call(direction)
        samples = measure.in_turns(calls, paces, self.repeats, self.device)
        of_roofs = {roof: samples[roof.name] for roof in self.roofs}
        for roof in self.roofs:
            found[roof.name] = _times(samples[roof.name], roof.work.flops, roof.work.bytes)
        for row in contest.rows:
            if row.name in subjects:
                mine = samples[row.name]
                facts = _facts(mine, subjects[row.name], direction, of_roofs)
                if row.at is not None:
                    facts["measured_at"] = row.at(setting.shape)
                elif contest.baseline in subjects:
                    facts["speed_ratio"] = measure.ratio(mine, samples[contest.baseline])
                    facts["speed_ratio_to"] = contest.baseline
                if self.with_memory:
                    facts["peak_bytes"] = self._peak(row, subjects[row.name], setting, direction)
                found[row.name] = facts
        return found

    def _peak(self, row: Row, subject: Subject, setting: Setting, direction: str) -> int:
        if self.device == "cuda":
            return measure.peak_on_gpu(subject.call(direction))
        mine = row.setting(setting)
        small = replace(mine, shape=self.operator.quick(mine.shape))
        return measure.peak_on_cpu(row, mine, direction, small)

    def _prepare(self, row: Row, setting: Setting, direction: str) -> tuple[Subject, Pace] | str:
        mine = row.setting(setting)
        reason = self._not_compiled.get((row.name, str(mine), direction))
        return reason or prepare(row, mine, direction)

    def table(self, setting: Setting) -> str:
        on_gpu = self.device == "cuda"
        threads = "" if on_gpu else f", {torch.get_num_threads()} threads"
        parts = [f"{self.operator.name}  {setting}  {self.device}{threads}"]
        rows = self.rows_at(setting)
        for contest in self.operator.contests[self.device]:
            for direction in self.operator.passes:
                mine = [r for r in rows if r["contest"] == contest.name and r["pass"] == direction]
                header = [f"{contest.name}, {direction}", "ms", "quartiles", "tokens/s"]
                header += ["TFLOP/s", "GB/s"] if on_gpu else ["GFLOP/s", "GB/s"]
                header += ["% of roof", "peak MiB", f"x {contest.baseline}"]
                if mine:
                    parts.append(report.table(header, [_cells(row, on_gpu) for row in mine]))
        if bounds := [b for b in self.bounds if b["shape"] == setting.shape]:
            parts.append("\n".join(_bound_line(bound) for bound in bounds))
        parts += [f"left out: {what}" for what in self.left_out if what.startswith(f"{setting}:")]
        return "\n\n".join(parts)


def prepare(row: Row, setting: Setting, direction: str) -> tuple[Subject, Pace] | str:
    """A row's subject, warm, and its pace; or the reason why it cannot be timed."""
    if row.peer is not None and (reason := peers.why_not(row.peer)):
        return reason
    try:
        subject = row.prepare(setting)
        return subject, measure.warm_up(subject.call(direction), setting.device)
    except torch.OutOfMemoryError:
        return "out of memory"
    except ModuleNotFoundError as error:
        return f"not installed: {error.name}"
    except Exception as error:
        if row.peer is None:
            raise
        return f"fails: {type(error).__name__}: {error}"


def _facts(
    samples: Samples, subject: Subject, direction: str, roofs: dict[Roof, Samples]
) -> dict[str, Any]:
    work = subject.work[direction]
    facts = _times(samples, work.flops, work.bytes)
    facts["tokens_per_second"] = subject.tokens / samples.median
    if least := measure.least_seconds(work, roofs):
        facts["roof_ms"] = 1e3 * least
        facts["percent_of_roof"] = 100 * least / samples.median
    return facts


def _times(samples: Samples, flops: int, moved: int | None) -> dict[str, Any]:
    low, high = samples.quartiles
    facts = {
        "median_ms": 1e3 * samples.median,
        "quartiles_ms": [1e3 * low, 1e3 * high],
        "gflop_per_second": flops / samples.median / 1e9 if flops else None,
        "gb_per_second": moved / samples.median / 1e9 if moved else None,
        "work": {"flops": flops or None, "bytes": moved},
        "samples_ms": [1e3 * seconds for seconds in samples.seconds],
        "calls_per_sample": samples.pace.calls,
    }
    if samples.pace.host_seconds is not None:
        facts["host_ms"] = 1e3 * samples.pace.host_seconds
    return facts


def _bounds(
    operator: Operator, setting: Setting, rows: Sequence[dict[str, Any]], roofs: Sequence[Roof]
) -> list[dict[str, Any]]:
    """The bare operator's forward and backward beside their bounds, at the roofs measured with it.

    Only on a GPU, whose kernels the bounds are about, and if both passes were measured.
    """
    contest = operator.contests[setting.device][0]
    by = {
        (r["pass"], r["row"]): r for r in rows if r["contest"] == contest.name and "median_ms" in r
    }
    measured = all((direction, "ours") in by for direction in PASSES)
    if setting.device != "cuda" or operator.bounds is None or not measured:
        return []
    forward, both = (by[direction, "ours"]["median_ms"] for direction in PASSES)
    found = []
    for direction, ms, measured in (
        (FORWARD, forward, FORWARD),
        (BACKWARD, both - forward, TRAINING),
    ):
        work = operator.bounds(setting)[direction]
        of_roofs = {
            roof: Samples([by[measured, roof.name]["median_ms"] / 1e3], Pace(1)) for roof in roofs
        }
        least = 1e3 * measure.least_seconds(work, of_roofs)
        found.append(
            {
                **{"shape": setting.shape, "pass": direction, "ms": ms, "bound_ms": least},
                **{"times_bound": ms / least, "flops": work.flops, "bytes": work.bytes},
            }
        )
    return found


# ---- showing -------------------------------------------------------------------------------------


def _cells(row: dict[str, Any], on_gpu: bool) -> list[str]:
    if "reason" in row:
        return [row["row"], row["reason"]]

    def shown(key: str, form: str, scale: float = 1) -> str:
        value = row.get(key)
        return "-" if value is None else format(value / scale, form)

    name = row["row"]
    if "measured_at" in row:
        sizes = row["measured_at"].items()
        changed = [f"{letter}={size}" for letter, size in sizes if row["shape"][letter] != size]
        name = f"{name} ({', '.join(changed)})" if changed else name
    low, high = row["quartiles_ms"]
    cells = [name, shown("median_ms", ".3f"), f"{low:.3f}..{high:.3f}"]
    cells.append(shown("tokens_per_second", ",.0f"))
    if on_gpu:
        cells += [shown("gflop_per_second", ".1f", 1e3), shown("gb_per_second", ",.0f")]
    else:
        cells += [shown("gflop_per_second", ".2f"), shown("gb_per_second", ",.1f")]
    cells += [shown("percent_of_roof", ".1f"), shown("peak_bytes", ",.1f", 2**20)]
    return [*cells, shown("speed_ratio", ".2f")]


def _bound_line(bound: dict[str, Any]) -> str:
    return (
        f"{bound['pass']}: {bound['ms']:.3f} ms, {bound['times_bound']:.2f} times its bound of "
        f"{bound['bound_ms']:.3f} ms ({bound['flops'] / 1e9:.1f} GFLOP, "
        f"{bound['bytes'] / 1e6:.0f} MB)"
    )
