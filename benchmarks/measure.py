"""How a number comes about: times taken in turns, the machine's roof, and peak memory.

Calls that are compared are timed in turns (a b a b ...), so that a machine that slows down slows
all of them. A sample is the mean of so many calls in a row that it lasts SAMPLE_SECONDS. Where that
takes more than one call, an untimed one goes before them: the caches are full of the others' data.

On a GPU every call has a pair of CUDA events of its own. Before each, a buffer larger than the L2
cache is read, so that inputs come from memory; it is read as often as the CPU needs to issue the
call, so that the GPU does not wait for launches inside it. What the CPU needs is written down too:
a model that keeps the GPU busy does not wait for it either, one that does not pays it.
"""

from __future__ import annotations

import ctypes
import functools
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

SAMPLE_SECONDS = {"cpu": 0.1, "cuda": 0.02}
WARM_UP_CALLS = 2
MOST_FLUSHES = 50  # before a call: one that the CPU issues more slowly than this is bound by it
SLOWER_HOST = 1.5  # times as long as measured: what flushes still cover
Call = Callable[[], object]


# ---- time ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """How a sample of a call is taken.

    Attributes:
        calls: in a row.
        flushes: of the GPU's L2 cache before each call.
        host_seconds: that the CPU needs to issue a call to the GPU; None on the CPU.
    """

    calls: int
    flushes: int = 0
    host_seconds: float | None = None


@dataclass(frozen=True)
class Samples:
    """Seconds per call; each is the mean of as many calls as its pace says."""

    seconds: list[float]
    pace: Pace

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) == 1:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def seconds_per_call(call: Call, pace: Pace, device: str) -> float:
    """The mean time of calls in a row, by the device's own clock."""
    if device == "cuda":
        flush = _l2_flush() if pace.flushes else None
        events = []
        for _ in range(pace.calls):
            for _ in range(pace.flushes):
                flush()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return statistics.fmean(start.elapsed_time(end) for start, end in events) / 1e3
    start = time.perf_counter()
    for _ in range(pace.calls):
        call()
    return (time.perf_counter() - start) / pace.calls


def warm_up(call: Call, device: str) -> Pace:
    """Calls a few times; returns how samples of this call are to be taken."""
    for _ in range(WARM_UP_CALLS):
        call()
    if device == "cpu":
        return Pace(math.ceil(SAMPLE_SECONDS[device] / seconds_per_call(call, Pace(1), device)))
    host = statistics.median(_issue_seconds(call) for _ in range(3))
    return gpu_pace(seconds_per_call(call, Pace(1), device), host, _flush_seconds())


def _issue_seconds(call: Call) -> float:
    """What the CPU needs to issue a call to an idle GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def gpu_pace(seconds: float, host_seconds: float, flush_seconds: float) -> Pace:
    """The pace of a call that takes so long on the GPU, and so long to be issued to it."""
    flushes = min(MOST_FLUSHES, 1 + math.ceil(SLOWER_HOST * host_seconds / flush_seconds))
    around = seconds + flushes * flush_seconds  # a sample may last twice as long with flushes
    most = SAMPLE_SECONDS["cuda"]
    calls = max(1, min(math.ceil(most / seconds), math.ceil(2 * most / around)))
    return Pace(calls, flushes, host_seconds)


@functools.cache
def _l2_flush() -> Call:
    """A read of more than the L2 cache holds: unlike a write, it leaves nothing to write back."""
    size = 4 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    buffer = torch.ones(size // 4, device="cuda")
    out = torch.empty((), device="cuda")
    return lambda: torch.sum(buffer, dim=0, out=out)


@functools.cache
def _flush_seconds() -> float:
    flush = _l2_flush()
    for _ in range(WARM_UP_CALLS):
        flush()
    return seconds_per_call(flush, Pace(20), "cuda")


def in_turns(
    calls: dict[str, Call], paces: dict[str, Pace], repeats: int, device: str
) -> dict[str, Samples]:
    """Times every call `repeats` times, in turns; returns Samples by name."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            if paces[name].calls > 1:
                call()
            seconds[name].append(seconds_per_call(call, paces[name], device))
    return {name: Samples(seconds[name], paces[name]) for name in calls}


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

    @property
    def kind(self) -> str:
        return "flops" if self.work.flops else "bytes"


def _products() -> Call:
    a, b = torch.randn(2, 512, 64, 64).unbind()
    out = torch.empty_like(a)
    return lambda: torch.bmm(a, b, out=out)


def _large_product() -> Call:
    # Random numbers: a GPU multiplies zeros faster than data.
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16).unbind()
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _copy(device: str, count: int) -> Call:
    source = torch.rand(count, device=device)
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
        Roof(
            "roof: copy",
            "copy of 128 MiB within memory, 256 MiB moved; the median of samples taken in turns "
            "with the rows",
            Work(0, 2 * 2**27),
            functools.partial(_copy, "cpu", 2**25),
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
            functools.partial(_copy, "cuda", 2**28),
        ),
    ),
}


def roofs_of(device: str, kinds: tuple[str, ...]) -> tuple[Roof, ...]:
    """The device's roofs of these kinds ("flops", "bytes")."""
    return tuple(roof for roof in ROOFS[device] if roof.kind in kinds)


def least_seconds(work: Work, roofs: dict[Roof, Samples]) -> float:
    """The time that the roofs allow the work: that of its slower kind; 0 if they say nothing."""
    times = [0.0]
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


def peak_on_gpu(call: Call) -> int:
    """Bytes that a call takes at its peak, over what is there before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(row: Row, setting: Setting, direction: str, small: Setting) -> int:
    """Bytes that a row's call takes at its peak, over those of its inputs, in a fresh process.

    small: the setting of the warm-up call, without which loading of libraries would count.
    """
    arguments = (row, setting, direction, small, torch.get_num_threads())
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as process:
        return process.submit(_peak_here, *arguments).result()


def _peak_here(row: Row, setting: Setting, direction: str, small: Setting, threads: int) -> int:
    torch.set_num_threads(threads)
    row.prepare(small).call(direction)()
    return growth(row.prepare(setting).call(direction))


def growth(call: Call) -> int:
    """By how many bytes the resident set's peak rises in a call, in this process."""
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
