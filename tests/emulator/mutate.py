"""Breaks the CUDA kernels one line at a time, to see which mistakes no test would notice.

    make mutate ARGS="csrc/titans/titans_states.cuh --minutes 30"

Every mutant is one change in one line: a barrier or a wait less, a statement less, a comparison or
a sign turned round, a number greater by one. Built in a copy of csrc, it is tried on some of
``instances.py`` under two schedules; the few that pass there meet the laws and the facts of their
operator, then the race detector and AddressSanitizer. Mutants come in random order, so a run that
the time limit ends is a sample. What survives is a line that does not matter, or a test that is
missing: those that have been understood are in survivors.md, as the line before and after.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from emulator import build, library

CSRC = build.ROOT / "csrc"
KNOWN = build.HERE / "survivors.md"
INSTANCES = build.HERE / "instances.py"
# A mutant that takes longer hangs; some spoil the heap and wait for it forever.
SECONDS = {"few instances": 60, "all instances, laws": 200, "races": 600, "address": 600}
PRIMITIVES = {Path("common/primitives.cuh"), Path("common/launch.cuh")}  # they have self-tests
# The first try leaves most instances out, which saves most of the compiler's time.
FEW_INSTANCES = {
    Path("titans/titans_launch.cuh"): (
        r"case (?:32|128):\s*return body\(\w+, Constant<\w+>\(\)\);"
        r"|case Element::float16:\s*return for_key\(Type<fp16>\(\)\);"
    )
}
FEW = r"^(conv|titans-(plain|\w+-(16|64)x)).*-(float32|bfloat16)$"


@dataclass(frozen=True)
class Mutant:
    file: Path  # within csrc
    line: int
    before: str
    after: str

    def __str__(self) -> str:
        before, after = self.before.strip(), self.after.strip()
        return f"csrc/{self.file}:{self.line}: `{before}` -> `{after}`"

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies it when lines have moved."""
        return self.file.name, self.before.strip(), self.after.strip()


# ---- mutations -----------------------------------------------------------------------------------

SYNCHRONISATION = re.compile(
    r"(__sync\w+\(\)|named_barrier_\w+\([^;]*\)|cp_async_(wait<\w+>|commit)\(\)|wait_for_\w+<[^;]*\));"
)
SWAPS = {
    " < ": " <= ",
    " <= ": " < ",
    " > ": " >= ",
    " >= ": " > ",
    " == ": " != ",
    " != ": " == ",
    " && ": " || ",
    " || ": " && ",
    " + ": " - ",
    " - ": " + ",
    " += ": " -= ",
    " *= ": " += ",
    "<true": "<false",
    "<false": "<true",
    "min(": "max(",
    "max(": "min(",
}
# A whole statement in a line: an assignment, a call, a jump; no declaration.
STATEMENT = re.compile(
    r"\s*(if \(.*\) |else )?(continue|return|[\w:<>\[\]().>-]+ ?([-+*]?= .*|\(.*\)));\s*"
)
NUMBER = re.compile(r"(?<![\w.#])(\d+)(?![\w.])")


def changes(line: str) -> Iterator[str]:
    """The mutants of a line of code."""
    code, slashes, comment = line.partition("//")
    if not code.strip() or code.lstrip().startswith(("#", "static_assert", "template", "*")):
        return
    rest = slashes + comment
    for found in SYNCHRONISATION.finditer(code):
        yield code[: found.start()] + ";" + code[found.end() :] + rest
    if STATEMENT.fullmatch(code) and not SYNCHRONISATION.search(code):
        yield code[: len(code) - len(code.lstrip())] + ";"
    for old, new in SWAPS.items():
        for found in re.finditer(re.escape(old), code):
            yield code[: found.start()] + new + code[found.end() :] + rest
    for found in NUMBER.finditer(code):
        yield code[: found.start()] + str(int(found[1]) + 1) + code[found.end() :] + rest


def mutants(file: Path) -> Iterator[Mutant]:
    """All of a file; ``file`` is relative to csrc."""
    for number, line in enumerate((CSRC / file).read_text().splitlines(), 1):
        for after in dict.fromkeys(changes(line)):
            yield Mutant(file, number, line, after)


# ---- trying one ----------------------------------------------------------------------------------


def included(source: Path) -> set[Path]:
    """A source and our own headers that it includes, at any remove; relative to csrc."""
    seen, todo = set(), [source]
    while todo:
        file = todo.pop()
        if file not in seen and (CSRC / file).exists():
            seen.add(file)
            names = re.findall(r'^#include "([^"]+)"', (CSRC / file).read_text(), re.MULTILINE)
            todo += map(Path, names)
    return seen


def stem_of(file: Path) -> str:
    return "" if file.parts[0] == "common" else file.parts[0]


@dataclass
class Attempt:
    """One build of a mutant, and what tries it."""

    name: str
    variant: str
    csrc: Path
    match: str
    seeds: tuple[int, ...] = (1,)
    tests: bool = False


class Workshop:
    """Copies of csrc, in which one line at a time is changed."""

    def __init__(self, folder: Path) -> None:
        self.csrc, self.few = folder / "csrc", folder / "few"
        self.bounds = folder / "bounds.pt"
        for copy in (self.csrc, self.few):
            shutil.copytree(CSRC, copy)
        for file, instances in FEW_INSTANCES.items():
            source = self.few / file
            source.write_text(re.sub(instances, "", source.read_text()))
        whole = Attempt("definitions", "plain", CSRC, "")
        if problem := self.try_instances(library.make(), whole):  # and leaves the bounds
            raise SystemExit(f"the kernels as they are: {problem}")

    def attempts(self, file: Path) -> Iterator[Attempt]:
        stem = f"(?=^{stem_of(file)})"
        if file not in FEW_INSTANCES:  # whose lines are others there
            yield Attempt("few instances", "plain", self.few, stem + FEW, (1, 2))
        yield Attempt("all instances, laws", "plain", self.csrc, stem, tests=True)
        yield Attempt("races", "races", self.csrc, stem)
        yield Attempt("address", "address", self.csrc, stem)

    def judge(self, mutant: Mutant) -> str | None:
        """Who catches the mutant, or None."""
        for attempt in self.attempts(mutant.file):
            file = attempt.csrc / mutant.file
            original = file.read_text()
            lines = original.splitlines()
            assert lines[mutant.line - 1] == mutant.before
            lines[mutant.line - 1] = mutant.after
            file.write_text("\n".join(lines) + "\n")
            try:
                problem = self.try_out(attempt, mutant.file)
            except build.CompileError:
                problem = "does not compile"
            finally:
                file.write_text(original)
            if problem:
                return f"{attempt.name}: {problem}"
        return None

    def try_out(self, attempt: Attempt, file: Path) -> str | None:
        """What is wrong, or None."""
        sources = [s for s in library.kernels() if file in included(s.relative_to(CSRC))]
        instead = {source: attempt.csrc / source.relative_to(CSRC) for source in sources}
        made = library.make(attempt.variant, instead=instead, csrc=attempt.csrc)
        try:
            problem = self.try_instances(made, attempt)
            return problem or (self.try_tests(made, stem_of(file)) if attempt.tests else None)
        finally:  # thousands of them would fill the disk
            made.unlink()
            options = {"csrc": attempt.csrc, **library.options()}
            for source in instead.values():
                kept = build.compile_object(source, attempt.variant, **options)
                kept.with_suffix(".o.log").unlink()
                kept.unlink()

    def try_instances(self, made: Path, attempt: Attempt) -> str | None:
        command = [sys.executable, INSTANCES, made, "--bounds", self.bounds]
        command += ["--match", attempt.match, "--seeds", *attempt.seeds]
        try:
            run = build.run(
                command,
                attempt.variant,
                preload=True,
                extra={"PYTHONPATH": f"{build.ROOT}:{build.HERE.parent}"},
                timeout=SECONDS.get(attempt.name, 300),
            )
        except subprocess.TimeoutExpired:
            return "hangs"
        return verdict(run)

    def try_tests(self, made: Path, stem: str) -> str | None:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += ["-k", f"emulated and {stem}" if stem else "emulated"]
        command += [build.HERE.parent / f"test_{name}.py" for name in ("ops", "titans", "conv")]
        extra = {"HOPE_EMULATED_LIBRARY": str(made)}
        try:
            return verdict(build.run(command, extra=extra, timeout=400))
        except subprocess.TimeoutExpired:
            return "hangs"


def verdict(run: subprocess.CompletedProcess[str]) -> str | None:
    if run.returncode == 0:
        return None
    lines = run.stdout.splitlines() or [""]
    told = [
        line for line in lines if re.search(r"^(E +)?\w*Error: |^SUMMARY: |runtime error: ", line)
    ]
    return f"{(told or lines)[-1].removeprefix('E').strip()[:120]} (status {run.returncode})"


# ---- the run -------------------------------------------------------------------------------------


def known() -> set[tuple[str, str, str]]:
    """The survivors that have been explained."""
    entries = re.findall(r"^- `([^`]+)`: `([^`]+)` -> `([^`]+)`", KNOWN.read_text(), re.MULTILINE)
    return set(entries)


def kernel_files() -> list[Path]:
    files = {file for s in library.kernels() for file in included(s.relative_to(CSRC))}
    return sorted(file for file in files - PRIMITIVES if file.suffix in (".cu", ".cuh"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: all that kernels consist of")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--list", action="store_true", help="only say which mutants there are")
    options = parser.parse_args()
    files = [file.resolve().relative_to(CSRC) for file in options.files]
    files = files or kernel_files()
    explained = known()
    todo = [m for file in files for m in mutants(file) if m.key not in explained]
    random.Random(options.seed).shuffle(todo)
    if options.list:
        print("\n".join(map(str, sorted(todo, key=lambda m: (m.file, m.line)))))
        return 0
    begin, survivors, tried = time.monotonic(), [], 0
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        for mutant in todo:
            if time.monotonic() - begin > 60 * options.minutes:
                break
            tried += 1
            verdict = workshop.judge(mutant)
            survivors += [] if verdict else [mutant]
            print(f"[{tried}/{len(todo)}] {mutant}\n    {verdict or 'SURVIVES'}", flush=True)
    print(f"\n{len(survivors)} of {tried} mutants survive ({len(todo)} there are):")
    print("\n".join(f"- `{m.file.name}`: " + str(m).partition(": ")[2] for m in survivors))
    return 0


if __name__ == "__main__":
    sys.exit(main())
