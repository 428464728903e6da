"""What is written down with every result: the machine, the versions, the sources, a table."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import hope_ext
from benchmarks import sources

QUIET_LOAD = 0.5  # load average per core at the start, above which a warning is given
QUIET_OTHERS = 0.1  # cores that other processes use during the run, likewise


def environment(device: str, stem: str | None = None) -> dict[str, Any]:
    """The facts that a speed depends on; `stem`: also a hash of that operator's sources.

    What cannot be found out, such as the commit outside of a git checkout, is None.
    """
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hope_ext": hope_ext.build_info(),
        **sources.revision(),
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts["gpu"] = {
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory": gpu.total_memory,
            "cuda": torch.version.cuda,
            "l2_bytes": gpu.L2_cache_size,
            "driver": _nvidia_smi("driver_version"),
        }
    if stem is not None:
        facts["sources_sha256"] = sources.sources_hash(stem)
    return facts


def cuda_stems() -> list[str]:
    """The operators that the loaded extension has CUDA kernels for."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    names = [name.removeprefix("hope::") for name in registered if name.startswith("hope::")]
    return [stem for stem in sources.stems() if any(name.startswith(stem) for name in names)]


CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")


def clocks() -> dict[str, str] | None:
    """The GPU's clocks, power and temperature now; None where nvidia-smi does not say them."""
    line = _nvidia_smi(",".join(CLOCKS))
    values = [value.strip() for value in (line or "").split(",")]
    return dict(zip(CLOCKS, values, strict=True)) if len(values) == len(CLOCKS) else None


def _nvidia_smi(query: str) -> str | None:
    """Its answer for the first GPU that it lists."""
    answer = sources.output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    return answer.splitlines()[0] if answer else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


# ---- other processes -----------------------------------------------------------------------------


class Neighbours:
    """Watches, from its making on, how busy other processes keep the machine."""

    def __init__(self) -> None:
        self.load_at_start = os.getloadavg()
        self._start, self._others = time.monotonic(), _others_cpu_seconds()

    def facts(self) -> dict[str, Any]:
        """Load averages (1, 5, 15 minutes), and the mean number of cores that others used.

        others_cores: None where the system does not tell.
        """
        now, others = time.monotonic(), None
        if self._others is not None:
            others = max(0.0, (_others_cpu_seconds() - self._others) / (now - self._start))
        return {
            "load_average_at_start": self.load_at_start,
            "load_average_at_end": os.getloadavg(),
            "others_cores": others,
        }


def loaded(facts: dict[str, Any]) -> str | None:
    """A warning if other processes disturbed the measurement."""
    load, others = facts["load_average_at_start"][0], facts["others_cores"]
    if load <= QUIET_LOAD * (os.cpu_count() or 1) and (others or 0) <= QUIET_OTHERS:
        return None
    used = "" if others is None else f", and others used {others:.2f} cores during the run"
    return f"warning: the machine is not quiet: load average {load:.2f} at the start{used}"


def _others_cpu_seconds() -> float | None:
    """CPU time of all processes but this one and its finished children."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _, _, interrupt, soft_interrupt = map(int, fields[:7])
    all_seconds = (user + nice + system + interrupt + soft_interrupt) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return all_seconds - (own.user + own.system + own.children_user + own.children_system)


# ---- options and tables --------------------------------------------------------------------------


def positive(text: str) -> int:
    """The type of a command line's count."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text: the first column to the left, the others to the right.

    A row with fewer cells than the header may hold any text in its second, such as the reason why
    there are no numbers.
    """
    full = [header, *(row for row in rows if len(row) == len(header))]
    widths = [max(len(row[column]) for row in full) for column in range(len(header))]
    widths[0] = max(len(row[0]) for row in [header, *rows])
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0])]
        if len(row) == len(header):
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        else:
            cells += row[1:]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
