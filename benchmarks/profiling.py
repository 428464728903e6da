"""Where the time of an operator goes: torch.profiler's traces, and ncu's report of the kernels.

    python -m benchmarks.ops --op titans --profile

writes a trace of each of our rows and pass forward+backward, for a trace viewer. On a GPU, where
NVIDIA's Nsight Compute (ncu) is there and may read the counters, it also writes a report of every
kernel of one call, and shows its details; otherwise it says why not. The GPU's clocks are left as
they are.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import measure, sources
from benchmarks.subjects import Contest, Operator, Row, Setting

PROFILED_CALLS = 5
NCU_SECONDS = 240
SETS = ("full", "basic")  # of ncu's sections: the first that works


def profile(operator: Operator, settings: Sequence[Setting], device: str, out: Path) -> None:
    """Traces our rows (forward+backward, where there is one), shows the costliest calls, and writes
    the traces."""
    out = out.resolve()  # ncu runs in the checkout
    out.mkdir(parents=True, exist_ok=True)
    for number, setting in enumerate(settings, 1):
        for contest in operator.contests[device]:
            name = f"{operator.stem}-{device}-{contest.name}-{number}"
            _trace(operator, contest, setting, out / f"{name}.trace.json")
        print(kernel_report(operator, setting, out / f"{operator.stem}-{device}-{number}"))


def _trace(operator: Operator, contest: Contest, setting: Setting, path: Path) -> None:
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if setting.device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    direction = operator.passes[-1]
    call = our_row(contest).prepare(setting).call(direction)
    measure.warm_up(call, setting.device)
    with torch.profiler.profile(activities=kinds, acc_events=True) as profiled:
        for _ in range(PROFILED_CALLS):
            call()
        if setting.device == "cuda":
            torch.cuda.synchronize()
    print(f"{operator.stem}  {setting}  {setting.device}: {contest.name}, {direction}")
    by = f"self_{setting.device}_time_total"
    print(profiled.key_averages().table(sort_by=by, row_limit=15))
    profiled.export_chrome_trace(str(path))
    print(path)


def our_row(contest: Contest) -> Row:
    (row,) = (row for row in contest.rows if row.name == "ours")
    return row


# ---- Nsight Compute ------------------------------------------------------------------------------


def kernel_report(operator: Operator, setting: Setting, path: Path) -> str:
    """Runs ncu on one call of the operator, and writes `path`.ncu-rep; returns its details, or a
    line that says why there are none."""
    title = f"{operator.stem}  {setting}: kernel report"
    if setting.device != "cuda":
        return f"{title} unavailable: it is about kernels on a GPU"
    ncu = sources.find_tool("ncu")
    if ncu is None:
        return f"{title} unavailable: no ncu (NVIDIA Nsight Compute) on PATH or in the toolkit"
    report = path.with_name(f"{path.name}.ncu-rep")
    dtype = str(setting.dtype).removeprefix("torch.")
    module = operator.name.replace("-", "_")  # a variant's is its own
    job = json.dumps({"module": module, "shape": setting.shape, "dtype": dtype})
    failures = []
    for sections in SETS:
        report.unlink(missing_ok=True)
        command = [ncu, "--set", sections, "--clock-control", "none", "--profile-from-start", "off"]
        command += ["--export", str(report.with_suffix("")), "--target-processes", "all"]
        command += [sys.executable, "-m", "benchmarks.profiling", job]
        said = _run(command)
        if report.exists():
            details = _run([ncu, "--import", str(report), "--page", "details"])
            return f"{title}\n{details}\n{report}"
        failures.append(f"--set {sections}: {' '.join(said.split())[-300:] or 'no output'}")
    return f"{title} unavailable: ncu failed; " + "; ".join(failures)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=NCU_SECONDS,
            cwd=sources.ROOT,
        )
    except subprocess.TimeoutExpired:
        return f"not finished within {NCU_SECONDS} s"
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """The program that ncu watches: the second call of our operator, forward and backward."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profiling", description=main.__doc__
    )
    parser.add_argument("job", help="JSON with the operator's module, the shape and the dtype")
    job = json.loads(parser.parse_args(arguments).job)
    operator: Operator = importlib.import_module(f"benchmarks.{job['module']}").BENCHMARK
    setting = Setting(job["shape"], getattr(torch, job["dtype"]), "cuda")
    subject = our_row(operator.contests["cuda"][0]).prepare(setting)
    call = subject.call(operator.passes[-1])
    call()
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():  # of all threads: the backward has its own
        call()
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
