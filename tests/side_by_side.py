"""Runs all tests, as many pytest processes side by side as there are processors: `make test`.

    python tests/side_by_side.py [ARGUMENTS OF PYTEST]

With arguments, one pytest gets them. Without, test files are shared out, the long ones first and
the longest in parts; what a process has printed is shown when it ends, and the last line sums up.
Status 1 if any test failed.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent
PART = "HOPE_TESTS_PART"  # "i/n": every n-th test of those that are collected, from the i-th on
# Files that take minutes, in this order, with the number of parts that they are run in.
LONG = {
    "test_emulated.py": 2,
    "test_ops.py": 4,
    "test_titans.py": 1,
    "test_build.py": 1,
    "test_selfmod.py": 1,
    "test_hope_train.py": 1,
}
FILES_AT_A_TIME = 6  # of the others: starting a process takes seconds, too
MOST_PROCESSES = 8
NO_TEST = 5  # pytest's status where it found none


class Unit(NamedTuple):
    files: tuple[str, ...]
    part: str = ""

    def __str__(self) -> str:
        return " ".join(self.files) + (f" ({self.part})" if self.part else "")


class Result(NamedTuple):
    unit: Unit
    status: int
    output: str
    seconds: float


def units() -> Iterator[Unit]:
    for file, parts in LONG.items():
        for i in range(parts):
            yield Unit((file,), f"{i}/{parts}" if parts > 1 else "")
    others = sorted(path.name for path in TESTS.glob("test_*.py") if path.name not in LONG)
    for i in range(0, len(others), FILES_AT_A_TIME):
        yield Unit(tuple(others[i : i + FILES_AT_A_TIME]))


def of_part(items: list, part: str) -> list:
    """The tests of a part, in conftest.py. Those of one case share results: they stay together."""
    index, parts = map(int, part.split("/"))
    groups: dict[object, list] = {}
    for number, item in enumerate(items):
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        groups.setdefault(str(case) if case else number, []).append(item)
    return [item for group in list(groups.values())[index::parts] for item in group]


def build_what_all_need() -> None:
    """The kernels' emulated libraries, which several processes would otherwise build at once."""
    sys.path.insert(0, str(TESTS.parent))
    from emulator import build, library

    for variant in ("plain", "races", "address"):
        with contextlib.suppress(build.Unavailable, build.CompileError):  # the tests say so
            library.make(variant)


def run(unit: Unit, threads: int) -> Result:
    begin = time.monotonic()
    command = [sys.executable, "-m", "pytest", *(str(TESTS / file) for file in unit.files)]
    done = subprocess.run(
        command,
        cwd=TESTS.parent,
        env={"OMP_NUM_THREADS": str(threads), **os.environ, PART: unit.part},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Result(unit, done.returncode, done.stdout, time.monotonic() - begin)


def summary(outputs: list[str]) -> Counter[str]:
    """How many tests passed, failed and so on, from pytest's last lines."""
    counts: Counter[str] = Counter()
    for output in outputs:
        last = output.rstrip().rpartition("\n")[2]
        for number, what in re.findall(r"(\d+) (passed|failed|errors?|skipped|xfailed)\b", last):
            counts[what.removesuffix("s")] += int(number)
    return counts


def main() -> int:
    if arguments := sys.argv[1:]:
        return subprocess.run([sys.executable, "-m", "pytest", *arguments]).returncode
    begin, results, processors = time.monotonic(), [], os.cpu_count() or 1
    processes = min(processors, MOST_PROCESSES)
    build_what_all_need()
    with ThreadPoolExecutor(processes) as pool:
        tasks = [pool.submit(run, unit, processors // processes) for unit in units()]
        for task in as_completed(tasks):
            result = task.result()
            results.append(result)
            print(f"\n==== {result.unit}: {result.seconds:.0f} s\n{result.output}", flush=True)
    counts = summary([result.output for result in results])
    bad = [result for result in results if result.status not in (0, NO_TEST)]
    for result in bad:
        print(f"not passed: {result.unit}, status {result.status}")
    counted = ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
    print(f"==== {counted or 'no tests'} in {time.monotonic() - begin:.0f} s")
    return int(bool(bad) or not counts["passed"])


if __name__ == "__main__":
    sys.exit(main())
