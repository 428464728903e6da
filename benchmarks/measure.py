"""How a number comes about: times taken in turns, the machine's roof, and peak memory.

Calls that are compared are timed in turns (a b a b ...), so that a machine that slows down slows
all of them. A sample is the mean of so many calls in a row that it lasts SAMPLE_SECONDS. Where that
takes more than one call, an untimed one goes before them: the caches are full of the others' data.
"""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.subjects import Row, Setting, Work

SAMPLE_SECONDS = 0.1
WARM_UP_CALLS = 2
Call = Callable[[], object]


# ---- time ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Seconds per call; `calls` were made for each."""

    seconds: list[float]
    calls: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) == 1:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def seconds_per_call(call: Call, calls: int, device: str) -> float:
    """The mean time of `calls` calls in a row, by the device's own clock."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def warm_up(call: Call, device: str) -> int:
    """Calls a few times; returns how many calls make a sample."""
    for _ in range(WARM_UP_CALLS):
        call()
    return math.ceil(SAMPLE_SECONDS / seconds_per_call(call, 1, device))


def in_turns(
    calls: dict[str, Call], counts: dict[str, int], repeats: int, device: str
) -> dict[str, Samples]:
    """Times every call `repeats` times, in turns; returns Samples by name."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            if counts[name] > 1:
                call()
            seconds[name].append(seconds_per_call(call, counts[name], device))
    return {name: Samples(seconds[name], counts[name]) for name in calls}


def ratio(one: Samples, other: Samples) -> float:
    """How many times the time of `other` is that of `one`: the median over the turns."""
    turns = zip(one.seconds, other.seconds, strict=True)
    return statistics.median(b / a for a, b in turns)


# ---- the roof ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roof:
    """A simple call of torch's that shows what the machine can do; `work` has one of the kinds."""

    name: str
    definition: str
    work: Work
    prepare: Callable[[], Call]


def _products() -> Call:
    a, b = torch.randn(2, 512, 64, 64).unbind()
    out = torch.empty_like(a)
    return lambda: torch.bmm(a, b, out=out)


def _large_product() -> Call:
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16).unbind()
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _copy() -> Call:
    source = torch.zeros(2**30, device="cuda", dtype=torch.uint8)
    out = torch.empty_like(source)
    return lambda: out.copy_(source)


ROOFS = {
    "cpu": (
        Roof(
            "roof: 64x64x64 products",
            "torch.bmm of float32 [512, 64, 64] x [512, 64, 64] into a preallocated output, "
            "2 * 512 * 64^3 flops; the median of samples taken in turns with the rows",
            Work(2 * 512 * 64**3),
            _products,
        ),
    ),
    "cuda": (
        Roof(
            "roof: bfloat16 matmul",
            "torch.mm of bfloat16 [8192, 8192] x [8192, 8192] into a preallocated output, "
            "2 * 8192^3 flops; the median of samples taken in turns with the rows",
            Work(2 * 8192**3),
            _large_product,
        ),
        Roof(
            "roof: device copy",
            "copy of 1 GiB within the GPU's memory, 2 GiB moved; the median of samples taken in "
            "turns with the rows",
            Work(0, 2 * 2**30),
            _copy,
        ),
    ),
}


def least_seconds(work: Work, roofs: dict[Roof, Samples]) -> float:
    """The time that the roofs allow the work: that of its slower kind."""
    times = []
    for roof, samples in roofs.items():
        if roof.work.flops:
            times.append(work.flops / roof.work.flops * samples.median)
        if roof.work.bytes and work.bytes is not None:
            times.append(work.bytes / roof.work.bytes * samples.median)
    return max(times)


# ---- memory --------------------------------------------------------------------------------------

_PROC = Path("/proc/self")
MEMORY_METHOD = {
    "cpu": "growth of the resident set's peak (VmHWM, reset through clear_refs) during one call in "
    "a fresh process, after a call with a few tokens",
    "cuda": "growth of torch.cuda.max_memory_allocated during one call",
}


def can_measure_memory(device: str) -> bool:
    """Whether there is a way here: on the CPU there is one on Linux alone."""
    return device == "cuda" or (_PROC / "clear_refs").exists()


def peak_memory(row: Row, setting: Setting, direction: str, small: Setting) -> int:
    """Bytes that a call takes at its peak, over those of its inputs.

    small: the setting of the warm-up call, without which loading of libraries would count.
    """
    if setting.device == "cuda":
        return _peak_on_gpu(row.prepare(setting).call(direction))
    arguments = (row, setting, direction, small, torch.get_num_threads())
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as process:
        return process.submit(_peak_here, *arguments).result()


def _peak_on_gpu(call: Call) -> int:
    call()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_here(row: Row, setting: Setting, direction: str, small: Setting, threads: int) -> int:
    torch.set_num_threads(threads)
    row.prepare(small).call(direction)()
    call = row.prepare(setting).call(direction)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps would be used again, and not counted
    (_PROC / "clear_refs").write_text("5")
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"{_PROC / 'status'} has no {field}")
