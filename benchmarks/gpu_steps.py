"""The steps of `make gpu` (see gpu.py): commands, each with its limit and what its end means."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import build_config
from benchmarks import sources

ROOT = sources.ROOT
LOG = sources.SCRATCH / "gpu.txt"  # all that the commands print
TAIL = 2500  # characters of it that a step which is not green keeps

GREEN, RED = "green", "red"
CUT, UNAVAILABLE, SKIPPED = "cut short", "unavailable", "skipped"

LEAST_SECONDS = 15  # what has less is not begun
PROBE_SECONDS = 20
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")
SANITIZER_FOUND = 86  # the exit status of a run with errors
NO_TESTS = 5  # pytest's exit status
LAST_CONTEST = 30  # seconds that a benchmark may go on after it has begun no more
MOST_PROCESSES = 8  # of pytest, whose definitions run on the CPU, one thread each
PART = "HOPE_TESTS_PART"  # tests/side_by_side.py
MARK = "on_gpu"  # of the tests that run on CUDA: tests/conftest.py
SHARES = {"titans": 3}  # of the benchmarks' time; it comes first. The others: 1


@dataclass(frozen=True)
class Outcome:
    """What came of a step. facts: for the result file."""

    status: str
    detail: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A part of the run.

    Attributes:
        name: what it is called in the result.
        seconds: the most it may take.
        run: does it, in the seconds that it is given.
        gate: nothing can follow unless it is green; otherwise only red stops the run.
    """

    name: str
    seconds: float
    run: Callable[[float], Outcome]
    gate: bool = False


# ---- running commands ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """A command's end. status: None if it was stopped at its limit."""

    status: int | None
    output: str

    @property
    def tail(self) -> dict[str, str]:
        return {"output_tail": self.output[-TAIL:]}

    @property
    def last_line(self) -> str:
        lines = [line for line in self.output.splitlines() if line.strip()]
        return lines[-1][:200] if lines else "no output"


def environment(code: str) -> dict[str, str]:
    """The environment of every command: this checkout's packages come first.

    code: the GPU's architecture, as TORCH_CUDA_ARCH_LIST has it.
    """
    inherited = {key: x for key, x in os.environ.items() if key != "HOPE_REFERENCE"}
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "HOPE_CUDA": "1",
        "HOPE_LINEINFO": "1",  # for compute-sanitizer's reports, and ncu's
        "TORCH_CUDA_ARCH_LIST": code,
    }


def run_command(words: Sequence[str], seconds: float, environment: dict[str, str]) -> Done:
    """Runs a command in the checkout, and ends it and all that it started at its limit."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
        output.seek(0)
        text = output.read()
    LOG.parent.mkdir(parents=True, exist_ok=True)
    with LOG.open("a") as log:
        log.write(f"\n$ {' '.join(words)}\n{text}\n[{status}]\n")
    return Done(status, text)


def _end(process: subprocess.Popen) -> None:
    """Ends a command and what it started: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            continue


def judge(done: Done, seconds: float, detail: str = "") -> Outcome:
    """What a command's end means where only its exit status counts."""
    if done.status is None:
        return Outcome(CUT, f"not finished within {seconds:.0f} s", done.tail)
    if done.status != 0:
        return Outcome(RED, f"exit status {done.status}", done.tail)
    return Outcome(GREEN, detail)


# ---- the steps -----------------------------------------------------------------------------------


class Steps:
    """The steps of one run, in their order in `plan`.

    Attributes:
        stems: the operators.
        code: the GPU's architecture, as TORCH_CUDA_ARCH_LIST has it.
        out: the folder of the benchmarks' results.
        kernels: the operators with CUDA kernels, of which the step `environment` tells.
    """

    def __init__(self, stems: Sequence[str], code: str, out: Path) -> None:
        self.stems, self.code, self.out = stems, code, out
        self.kernels: list[str] = []

    def plan(self) -> list[Step]:
        """Later steps get what time the earlier ones leave."""
        return [
            Step("build", 240, self.build, gate=True),
            Step("environment", 60, self.environment, gate=True),
            Step("self-tests", 60, self.selftests, gate=True),
            Step("laws", 120, self.laws),
            Step("operators' tests", 60, self.own_tests),
            Step("sanitizer", 75, self.sanitizer),
            Step("benchmarks", 360, self.benchmarks),
        ]

    def run(self, words: Sequence[str], seconds: float, **extra: str) -> Done:
        return run_command(words, seconds, {**environment(self.code), **extra})

    def python(self, words: Sequence[str], seconds: float, **extra: str) -> Done:
        return self.run([sys.executable, *words], seconds, **extra)

    def build(self, seconds: float) -> Outcome:
        """In place and for this GPU alone; --force, since it may be new though no source is."""
        # make must not take this build for the one that it made.
        (ROOT / "build/.built").unlink(missing_ok=True)
        done = self.python(["setup.py", "build_ext", "--inplace", "--force"], seconds)
        return judge(done, seconds, self.code)

    def environment(self, seconds: float) -> Outcome:
        done = self.python(["-m", "benchmarks.on_gpu", "environment"], seconds)
        outcome = judge(done, seconds)
        if outcome.status != GREEN:
            return outcome
        # Warnings may stand around it.
        (line,) = (line for line in done.output.splitlines() if line.startswith("{"))
        found = json.loads(line)
        self.kernels = found["cuda_stems"]
        return Outcome(GREEN, f"CUDA kernels: {', '.join(self.kernels) or 'none'}", found)

    def selftests(self, seconds: float) -> Outcome:
        done = self.python(["-m", "benchmarks.on_gpu", "selftests"], seconds)
        right = [line for line in done.output.splitlines() if line.endswith(": ok")]
        return judge(done, seconds, f"{len(right)} self-tests")

    def laws(self, seconds: float) -> Outcome:
        return self.pytest(["tests/test_ops.py"], seconds)

    def own_tests(self, seconds: float) -> Outcome:
        """What the operators' own files have, and those of all kernels."""
        names = {f"tests/{file.name}" for stem in self.stems for file in own_files(stem)}
        return self.pytest([*sorted(names), "tests/test_emulated.py"], seconds)

    def pytest(self, files: Sequence[str], seconds: float) -> Outcome:
        """The tests of these files that run on CUDA, shared out among processes, each of which ends
        at its first that fails."""
        words = ["-m", "pytest", "-x", "-v", "--color=no", "-m", MARK, *files]
        parts = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2))

        def part(number: int) -> Done:
            return self.python(words, seconds, **{PART: f"{number}/{parts}"} if parts > 1 else {})

        with ThreadPoolExecutor(parts) as pool:
            done = together(list(pool.map(part, range(parts))))
        tests = read_tests(done.output)
        outcomes = Counter(tests.values())
        counts = ", ".join(f"{outcomes[word]} {word}" for word in ("passed", "failed", "skipped"))
        found = {
            "passed_by_stem": {
                stem: sum(about(test, stem) and tests[test] == "passed" for test in tests)
                for stem in self.stems
            }
        }
        failed = [test for test, outcome in tests.items() if outcome in ("failed", "error")]
        if failed:
            return Outcome(RED, f"{counts}; first {failed[0]}", {**found, **done.tail})
        if done.status is None:
            return Outcome(CUT, f"{counts} within {seconds:.0f} s", {**found, **done.tail})
        if done.status not in (0, NO_TESTS):
            detail = f"{counts}; pytest's exit status {done.status}"
            return Outcome(RED, detail, {**found, **done.tail})
        if not outcomes["passed"]:
            return Outcome(SKIPPED, f"{counts}: nothing runs on CUDA", found)
        return Outcome(GREEN, counts, found)

    def sanitizer(self, seconds: float) -> Outcome:
        """Every tool on the smallest cases, if a probe shows that it works here."""
        end = time.monotonic() + seconds
        tool = sources.find_tool("compute-sanitizer")
        if tool is None:
            return Outcome(UNAVAILABLE, "no compute-sanitizer on PATH or in the toolkit")
        if reason := self.probe(tool):
            return Outcome(UNAVAILABLE, reason)
        found, facts = {}, {}
        for name in SANITIZER_TOOLS:
            left = end - time.monotonic()
            if left < LEAST_SECONDS:
                found[name] = (CUT, "no time left")
                continue
            # Without torch's cache every tensor is an allocation of its own, with watched ends.
            done = self.run(
                [*sanitize(tool, name), sys.executable, "-m", "benchmarks.on_gpu", "smallest"],
                left if name == SANITIZER_TOOLS[-1] else left / 2,
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            )
            ran = f"{done.output.count(' ran')} cases"
            if done.status == SANITIZER_FOUND:
                found[name] = (RED, "")
            elif done.status is None:
                found[name] = (CUT, ran)
            elif done.status != 0:
                found[name] = (UNAVAILABLE, f"exit status {done.status}")
            else:
                found[name] = (GREEN, ran)
            if found[name][0] != GREEN:
                facts = done.tail
            if found[name][0] == RED:
                break
        statuses = [status for status, _ in found.values()]
        worst = next(s for s in (RED, CUT, UNAVAILABLE, GREEN) if s in statuses)
        said = [f"{name} {status} {why}".strip() for name, (status, why) in found.items()]
        return Outcome(worst, "; ".join(said), facts)

    def probe(self, tool: str) -> str | None:
        """Why the sanitizer cannot be trusted here; None if it finds a planted mistake, and only
        it."""
        import torch

        try:
            home, _ = build_config.find_cuda(torch.version.cuda)
        except build_config.BuildError as error:
            return f"no compiler for a probe: {error}"
        number = re.findall(r"(\d+)\.(\d+)", self.code)[-1]
        with tempfile.TemporaryDirectory() as folder:
            program = str(Path(folder, "probe"))
            source = str(ROOT / "benchmarks/sanitizer_probe.cu")
            nvcc = [str(home / "bin/nvcc"), f"-arch=sm_{''.join(number)}", "-o", program, source]
            done = self.run(nvcc, PROBE_SECONDS)
            if done.status != 0:
                return f"the probe does not compile: {done.last_line}"
            for word, expected in (("right", 0), ("wrong", SANITIZER_FOUND)):
                done = self.run([*sanitize(tool, "memcheck"), program, word], PROBE_SECONDS)
                if done.status is None:
                    return f"a trivial kernel takes over {PROBE_SECONDS} s"
                if done.status != expected:
                    said = f"ended with {done.status}, not {expected}: {done.last_line}"
                    return f"the {word} probe {said}"
        return None

    def benchmarks(self, seconds: float) -> Outcome:
        """Times every operator that has CUDA kernels and a benchmark, one after the other.

        Each has its share of the time that is left.
        """
        end = time.monotonic() + seconds
        outcomes: dict[str, Outcome] = {}
        timed = [stem for stem in self.kernels if (ROOT / f"benchmarks/{stem}.py").exists()]
        shares = {stem: SHARES.get(stem, 1) for stem in timed}
        for stem in sorted(timed, key=lambda stem: -shares[stem]):
            left = max(0.0, end - time.monotonic())
            share = left * shares[stem] / sum(shares.values())
            # One more contest may take that long, unless nobody comes after it.
            most = share if len(shares) == 1 else share + LAST_CONTEST
            outcomes[stem] = self.benchmark(stem, min(left, most))
            del shares[stem]
            if outcomes[stem].status == RED:
                break
        if not outcomes:
            return Outcome(SKIPPED, "no operator with a benchmark has CUDA kernels in this build")
        statuses = [outcome.status for outcome in outcomes.values()]
        worst = next(s for s in (RED, CUT, GREEN) if s in statuses)
        (facts, *_) = (outcome.facts for outcome in outcomes.values() if outcome.status == worst)
        timed = [stem for stem, outcome in outcomes.items() if outcome.facts["timed"]]
        detail = "; ".join(f"{stem}: {outcome.detail}" for stem, outcome in outcomes.items())
        return Outcome(worst, detail, {**facts, "timed": timed})

    def benchmark(self, stem: str, seconds: float) -> Outcome:
        """One operator's; what does not fit into the time is left out."""
        if seconds < LEAST_SECONDS:
            return Outcome(CUT, "no time left", {"timed": False})
        words = ["-m", "benchmarks.ops", "--op", stem, "--device", "cuda", "--out", str(self.out)]
        words += ["--seconds", str(max(1, int(seconds - LAST_CONTEST)))]
        before = set(self.out.glob("*.json"))
        done = self.python(words, seconds)
        print(done.output if done.status == 0 else done.output[-TAIL:], flush=True)
        result: dict[str, Any] = {"rows": [], "left_out": []}
        name = ""
        for path in set(self.out.glob("*.json")) - before:
            result, name = json.loads(path.read_text()), path.name
        timed = sources.is_timed(result)
        outcome = judge(done, seconds, name)
        if outcome.status == GREEN and result["left_out"]:
            outcome = Outcome(CUT, f"{name}, {len(result['left_out'])} contests left out")
        elif outcome.status == GREEN and not timed:
            outcome = Outcome(RED, "it wrote no time of ours", done.tail)
        return Outcome(outcome.status, outcome.detail, {**outcome.facts, "timed": timed})


def own_files(stem: str) -> list[Path]:
    """The files with an operator's own tests."""
    return [file for form in ("", "_*") for file in (ROOT / "tests").glob(f"test_{stem}{form}.py")]


def together(parts: Sequence[Done]) -> Done:
    """The end of several processes of pytest, as if it had been one: the worst status."""
    statuses = [part.status for part in parts]
    bad = [status for status in statuses if status not in (0, NO_TESTS)]
    worst = None if None in bad else bad[0] if bad else min(statuses, key=lambda s: s or 0)
    ordered = sorted(parts, key=lambda part: part.status in bad)  # what failed comes last
    return Done(worst, "\n".join(part.output for part in ordered))


def read_tests(output: str) -> dict[str, str]:
    """The tests that `pytest -v` has run, and what came of each: "passed", "failed", "error" or
    "skipped"."""
    lines = re.findall(r"^(\S+::\S+) (PASSED|FAILED|ERROR|SKIPPED)\b", output, re.MULTILINE)
    return {test: outcome.lower() for test, outcome in lines}


def about(test: str, stem: str) -> bool:
    """Whether a test is about an operator: test_ops.py's name its case, others are in its files."""
    path, _, name = test.partition("::")
    own = re.fullmatch(rf"test_{stem}(_\w+)?\.py", Path(path).name)
    return bool(own or re.search(rf"[\[-]{stem}-", name))


def sanitize(tool: str, name: str) -> list[str]:
    """A sanitizer's command, to be followed by a program's: our kernels alone, not torch's."""
    words = [tool, "--tool", name, "--error-exitcode", str(SANITIZER_FOUND)]
    words += ["--kernel-name", "kns=hope", "--launch-timeout", "120"]
    return words + (["--report-api-errors", "no"] if name == "memcheck" else [])
