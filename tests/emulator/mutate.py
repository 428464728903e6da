"""Breaks the CUDA kernels one line at a time, to see which mistakes no test would notice.

    make mutate ARGS="csrc/titans/titans_states.cuh --minutes 30"

Every mutant is one change in one line: a barrier or a wait less, a statement less, a comparison or
a sign turned round, a number greater by one. Built in a copy of csrc, it is tried on a few of
``instances.py`` under two schedules; the few that pass there meet more of them, AddressSanitizer
and the race detector, then the laws and the facts of their operator. Mutants come in random order,
so a run that the time limit ends is a sample. What survives is a line that does not matter, or a
test that is missing: those that have been understood are in survivors.md, as the line before and
after. A mutant of which the compiler makes the code that it made before is no survivor.

A survivor takes a hundred times as long as what the first instances notice. So it pays to look at
all with --quick, to explain or mend what can be seen by reading, and to try the rest with --only.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from emulator import build, instances, library
from emulator.processes import forked, verdict, within
from hope_ext import testing

CSRC = build.ROOT / "csrc"
KNOWN = build.HERE / "survivors.md"
INSTANCES = build.HERE / "instances.py"
PRIMITIVES = {Path("common/primitives.cuh"), Path("common/launch.cuh")}  # they have self-tests
# Threads that wait for each other are slow where several mutants want the processors.
ENVIRONMENT = {"PYTHONPATH": f"{build.ROOT}:{build.HERE.parent}", "OMP_NUM_THREADS": "1"}
# Compiling is most of the work; nobody debugs a mutant.
FLAGS = ("-O1", "-g0")
LINK = ("-Wl,--strip-debug",)
FAST_LINKER = "-fuse-ld=gold"
HEADERS = ("<algorithm>", "<cuda_runtime.h>", "<cuda_bf16.h>", "<cuda_fp16.h>", '"cuda_emulator.h"')
TESTS = ("ops", "conv", "titans", "titans_operator", "titans_deep")
KEYS, DTYPES = (16, 32, 64, 128), ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Stage:
    """A build of a mutant, and what tries it."""

    name: str
    seconds: float  # A mutant that needs more hangs; some spoil the heap and wait for it forever.
    variant: str = "plain"
    keys: tuple[int, ...] = KEYS  # instances that are compiled and run
    dtypes: tuple[str, ...] = DTYPES
    seeds: tuple[int, ...] = (1,)
    backward: bool = True  # False: only the kernels of the forward, if that makes fewer sources
    deep: bool = True  # False: without the memories of several layers, if something else is left
    tests: bool = False
    nonsense: bool = False

    @property
    def match(self) -> str:
        """The instances, for ``instances.check``."""
        keys, dtypes = ("|".join(map(str, some)) for some in (self.keys, self.dtypes))
        return rf"^(conv|titans-\w+-({keys})x).*-({dtypes})$"

    def left_out(self) -> list[tuple[Path, str]]:
        """Files within csrc, and what takes the other instances from them."""
        keys = "|".join(str(key) for key in KEYS if key not in self.keys)
        dtypes = [dtype for dtype in DTYPES if dtype not in self.dtypes]
        launch, conv = Path("titans/titans_launch.cuh"), Path("conv/conv_cuda.cu")
        types = {"float32": "float", "bfloat16": "bf16", "float16": "fp16"}
        left_out = [(launch, rf"case (?:{keys}):\s*return body\(\w+, Constant<\w+>\(\)\);")]
        for dtype in dtypes:
            left_out += [
                (launch, rf"case Element::{dtype}:\s*return for_key\(Type<\w+>\(\)\);"),
                (conv, rf"(?<=\s)run<{types[dtype]}>\(p, backward, queue\)(?=;)"),
            ]
        return left_out if keys else left_out[1:]


FEW = {"keys": (16, 128), "dtypes": ("bfloat16",)}
FIRST = {"keys": (32,), "dtypes": ("float32",), "seeds": (1, 2), "deep": False}
STAGES = (
    Stage("forward", 3, **FIRST, backward=False),
    Stage("first instances", 12, **FIRST),
    Stage("few instances", 30, **FEW, seeds=(3,)),
    Stage("first under address", 200, "address", keys=(32,), dtypes=("float32",)),
    Stage("first under races", 300, "races", keys=(32,), dtypes=("float32",)),
    Stage("all instances, laws", 400, tests=True),
    Stage("races", 600, "races", **FEW),
    Stage("address", 600, "address", dtypes=("float32", "bfloat16"), nonsense=True),
)
QUICK = 2  # stages


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


def stem_of(files: Iterable[Path]) -> str:
    """How the names of cases begin that files have a part in."""
    folders = {file.parts[0] for file in files}
    return "" if "common" in folders or len(folders) > 1 else folders.pop()


def compiling() -> dict[str, list[str]]:
    """How mutants are compiled."""
    options = library.options()
    options["flags"] += FLAGS
    return options


SAME_CODE = "changes no code"


class Workshop:
    """Copies of csrc, one for each stage, in which one line at a time is changed."""

    def __init__(self, folder: Path, bounds: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.copies, self.bounds_file = {}, bounds
        self.bounds = torch.load(bounds, weights_only=False)
        self.link = [*LINK, *([FAST_LINKER] if build.supports(FAST_LINKER) else [])]
        self.options = compiling()
        self.options["flags"] += build.precompile(HEADERS, folder, **self.options)
        for number, stage in enumerate(STAGES):
            self.copies[stage] = shutil.copytree(CSRC, folder / str(number))
            for file, others in stage.left_out():
                source = self.copies[stage] / file
                text, count = re.subn(others, lambda m: "\n" * m[0].count("\n"), source.read_text())
                assert count, f"{file} has changed: {others}"
                source.write_text(text)

    def judge(self, mutant: Mutant, stages: Iterable[Stage] = STAGES) -> str | None:
        """Who catches the mutant, or None."""
        for stage in stages:
            if not self.sources(stage, [mutant.file]):
                continue
            file = self.copies[stage] / mutant.file
            original = file.read_text()
            lines = original.splitlines()
            if lines[mutant.line - 1] != mutant.before:
                continue  # one of those that are left out
            lines[mutant.line - 1] = mutant.after
            whole = stage.left_out() == [] and stage.variant == "plain"
            before = self.compiled(stage, [mutant.file]) if whole else {}
            try:
                file.write_text("\n".join(lines) + "\n")
                problem = self.try_out(stage, [mutant.file], before, tests=stage.tests)
            except build.CompileError:
                problem = "does not compile"
            finally:
                file.write_text(original)
            if problem:
                return problem if problem == SAME_CODE else f"{stage.name}: {problem}"
        return None

    def sources(self, stage: Stage, files: Iterable[Path]) -> list[Path]:
        """The kernels that files are part of; none if the stage has nothing of its own to say."""
        changed = set(files)
        sources = [s for s in library.kernels() if changed & included(s.relative_to(CSRC))]
        if not stage.deep:
            sources = [s for s in sources if "_network_" not in s.name] or sources
        forward = [source for source in sources if "_bwd_" not in source.name]
        return sources if stage.backward else forward if forward != sources else []

    def compiled(self, stage: Stage, files: Iterable[Path]) -> dict[Path, Path]:
        """Their objects."""
        csrc, sources = self.copies[stage], self.sources(stage, files)
        options = self.options if stage.variant == "plain" else compiling()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            tasks = {
                source: pool.submit(
                    build.compile_object,
                    csrc / source.relative_to(CSRC),
                    stage.variant,
                    csrc=csrc,
                    **options,
                )
                for source in sources
            }
        return {source: task.result() for source, task in tasks.items()}

    def try_out(
        self, stage: Stage, files: list[Path], before: Mapping[Path, Path], *, tests: bool
    ) -> str | None:
        """What is wrong, or None. `before`: the objects without the change, if that is of interest.

        What is compiled here is thrown away again: thousands of mutants would fill the disk.
        """
        objects, made, stem = self.compiled(stage, files), None, stem_of(files)
        others = "" if any("_network_" in s.name for s in objects) else "(?!titans-(deep|norm))"
        try:
            if before and all(before[s].read_bytes() == o.read_bytes() for s, o in objects.items()):
                return SAME_CODE
            made = library.make(stage.variant, instead=objects, link=self.link)
            problem = self.try_instances(made, stage, stem, others)
            return problem or (self.try_tests(made, stem) if tests else None)
        finally:
            for source, output in objects.items():
                if before.get(source) != output:
                    output.with_suffix(".o.log").unlink(missing_ok=True)
                    output.unlink(missing_ok=True)
            if made:
                made.unlink()

    def try_instances(self, made: Path, stage: Stage, stem: str, others: str) -> str | None:
        match = f"(?=^{stem}){others}{stage.match}"

        def check() -> None:
            testing.use_emulated(made)
            instances.check(match, stage.seeds, self.bounds, backward=stage.backward)

        if stage.variant == "plain":
            return verdict(forked(check, stage.seconds))
        command = [sys.executable, INSTANCES, made, "--bounds", self.bounds_file]
        command += ["--match", match, "--seeds", *stage.seeds]
        commands = [command]
        if stage.nonsense:
            commands.append([sys.executable, build.HERE / "nonsense.py", made, stem])
        for command in commands:
            run = functools.partial(build.run, command, stage.variant, preload=True)
            if problem := verdict(within(run, stage.seconds, ENVIRONMENT)):
                return problem
        return None

    def try_tests(self, made: Path, stem: str) -> str | None:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += ["-k", f"emulated and {stem}" if stem else "emulated"]
        command += [build.HERE.parent / f"test_{name}.py" for name in TESTS]
        run = functools.partial(build.run, command)
        return verdict(within(run, 400, {**ENVIRONMENT, "HOPE_EMULATED_LIBRARY": str(made)}))


# ---- the run -------------------------------------------------------------------------------------


def listed(file: Path) -> set[tuple[str, str, str]]:
    """The keys of mutants in a list like survivors.md, or like what a run prints in the end."""
    entries = re.findall(r"^- `([^`]+)`: `([^`]+)` -> `([^`]+)`", file.read_text(), re.MULTILINE)
    return set(entries)


def known() -> set[tuple[str, str, str]]:
    """The survivors that have been explained."""
    return listed(KNOWN)


def kernel_files() -> list[Path]:
    files = {file for s in library.kernels() for file in included(s.relative_to(CSRC))}
    return sorted(file for file in files - PRIMITIVES if file.suffix in (".cu", ".cuh"))


def as_they_are(folder: Path, bounds: Path, stages: Iterable[Stage], files: list[Path]) -> None:
    """The kernels without a change pass; leaves what the definitions give in `bounds`."""
    match = "|".join(f"(?=^{stem_of(files)}){stage.match}" for stage in stages)
    command = [sys.executable, INSTANCES, library.make(), "--bounds", bounds, "--seeds"]
    command += ["--match", match]
    problem = verdict(within(functools.partial(build.run, command), 400, ENVIRONMENT))
    if not problem:
        workshop = Workshop(folder, bounds)
        stages = [stage for stage in stages if workshop.sources(stage, files)]
        problems = (workshop.try_out(stage, files, {}, tests=False) for stage in stages)
        problem = next(filter(None, problems), None)
    if problem:
        raise SystemExit(f"the kernels as they are: {problem}")


class Worker:
    """What a process of the pool has: its own copies of csrc."""

    workshop: Workshop
    stages: tuple[Stage, ...]
    end: float

    @classmethod
    def start(cls, folder: Path, bounds: Path, stages: tuple[Stage, ...], end: float) -> None:
        cls.workshop = Workshop(Path(tempfile.mkdtemp(dir=folder)), bounds)
        cls.stages, cls.end = stages, end

    @classmethod
    def judge(cls, mutant: Mutant) -> tuple[Mutant, bool, str | None]:
        """The mutant, whether there was time for it, and who caught it."""
        if time.monotonic() > cls.end:
            return mutant, False, None
        return mutant, True, cls.workshop.judge(mutant, cls.stages)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: all that kernels consist of")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--list", action="store_true", help="only say which mutants there are")
    everything, first = range(len(STAGES)), range(QUICK)
    parser.add_argument("--stages", type=int, nargs="+", default=everything, help="from 0 on")
    parser.add_argument("--quick", dest="stages", action="store_const", const=first,
                        help="only the first instances: seconds for one")  # fmt: skip
    parser.add_argument("--only", type=Path, help="a list of mutants, as a run prints it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    options = parser.parse_args()
    files = [file.resolve().relative_to(CSRC) for file in options.files]
    files = files or kernel_files()
    explained, only = known(), listed(options.only) if options.only else None
    todo = [
        mutant
        for file in files
        for mutant in mutants(file)
        if mutant.key not in explained and (only is None or mutant.key in only)
    ]
    random.Random(options.seed).shuffle(todo)
    if options.list:
        print("\n".join(map(str, sorted(todo, key=lambda m: (m.file, m.line)))))
        return 0
    stages = tuple(STAGES[number] for number in options.stages)
    torch.set_num_threads(1)  # see `forked`
    begin, survivors, same, tried = time.monotonic(), [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        bounds = Path(folder, "bounds.pt")
        changed = sorted({mutant.file for mutant in todo})
        as_they_are(Path(folder, "as-they-are"), bounds, stages, changed)
        start = (Path(folder), bounds, stages, begin + 60 * options.minutes)
        with multiprocessing.get_context("fork").Pool(options.jobs, Worker.start, start) as pool:
            for mutant, was_tried, caught in pool.imap_unordered(Worker.judge, todo):
                if not was_tried:
                    continue
                tried += 1
                same += caught == SAME_CODE
                survivors += [] if caught else [mutant]
                print(f"[{tried}/{len(todo)}] {mutant}\n    {caught or 'SURVIVES'}", flush=True)
    print(f"\n{len(survivors)} of {tried} mutants survive ({len(todo)} there are); of {same} more")
    print("the compiler makes the same code:")
    for m in sorted(survivors, key=lambda m: (m.file, m.line)):
        print(f"- `{m.file.name}`: " + str(m).partition(": ")[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
