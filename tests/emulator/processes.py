"""Runs what tries a mutant in a process of its own, and says how that ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

PATIENCE = 10.0  # seconds for which a process may wait and do nothing


class Said(NamedTuple):
    """How a process ended; None if it did not."""

    status: int | None
    text: str


def within(run: Callable, seconds: float, extra: Mapping[str, str]) -> Said:
    try:
        ran = run(extra=extra, timeout=seconds)
    except subprocess.TimeoutExpired:
        return Said(None, "")
    return Said(ran.returncode, ran.stdout)


def forked(work: Callable[[], None], seconds: float) -> Said:
    """Runs Python in a copy of this process, which has torch already: that takes a second to load.

    Nobody may have made threads here, torch's included.
    """
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                sys.stdout = os.fdopen(1, "w", closefd=False)
                work()
                status = 0
            except BaseException:
                sys.stdout.write(traceback.format_exc())
            finally:
                sys.stdout.flush()
                os._exit(status)
        worked, last = time.monotonic(), -1.0
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            waits, used = activity(child)
            if used > last:
                worked, last = time.monotonic(), used
            if used > seconds or (waits and time.monotonic() - worked > max(seconds, PATIENCE)):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return Said(None, "")
            time.sleep(0.01)
        said.seek(0)
        return Said(os.waitstatus_to_exitcode(ended[1]), said.read())


def activity(process: int) -> tuple[bool, float]:
    """Whether it waits for something, and how much processor time it has used.

    Where others want the processors too, the time of day says nothing.
    """
    state, *numbers = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    user, system = numbers[10:12]
    return state == "S", (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def verdict(said: Said) -> str | None:
    if said.status is None:
        return "hangs"
    if said.status == 0:
        return None
    lines = said.text.splitlines() or [""]
    told = [
        line for line in lines if re.search(r"^(E +)?\w*Error: |^SUMMARY: |runtime error: ", line)
    ]
    return f"{(told or lines)[-1].removeprefix('E').strip()[:120]} (status {said.status})"
