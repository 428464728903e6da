"""Breaks the CUDA kernels one line at a time, to see which mistakes no test would notice.

    make mutate ARGS="csrc/titans/titans_states.cuh --minutes 30"

Every mutant is one change in one line (`mutations.py`). Nearly all are switches in one build of the
kernels (`switches.py`), and are tried on those of ``instances.py`` that come to their place: a few,
then all, then a few under AddressSanitizer and the race detector, then the laws of the operator.
The others, in constants, are compiled one by one (`workshop.py`) and tried in like stages.

Mutants come in random order, so a run that the time limit ends is a sample. What survives is a
line that does not matter, or a test that is missing: those that have been understood are in
survivors.md, as the line before and after. A survivor takes a hundred times as long as what the
first instances notice. So it pays to look at all with --quick, to explain or mend what can be seen
by reading, and to try the rest with --only.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import json
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from emulator import build, instances, library, mutations, trials, workshop
from emulator.mutations import CSRC, Mutant, kernel_files, known, listed
from emulator.processes import Said, forked, verdict, within
from emulator.switches import SETTING, Switchboard
from emulator.trials import Trial
from emulator.workshop import ENVIRONMENT, INSTANCES, STAGES, Workshop
from hope_ext import testing

SURVIVES, NOT_MET = "SURVIVES", "no instance comes there"


class Level(NamedTuple):
    """What tries a mutant that is a switch: the fastest of the instances that come to its place."""

    name: str
    variant: str = "plain"
    most: int = 1000  # instances
    budget: float = 1e6  # seconds that they may take in the kernels as they are, in `plain`
    seed: int = 1
    seconds: float = 0.5  # for everything that takes no time there
    times: float = 5  # how much slower than there a mutant is that does not hang
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")


EXACT = ("float32", "bfloat16")
LEVELS = (
    Level("few instances", most=6),
    Level("more instances", budget=2, seed=2),
    Level("all instances", seed=3),
    Level("address", "address", 4, seconds=30, times=40, dtypes=EXACT),
    Level("races", "races", 3, seconds=60, times=150, dtypes=EXACT),
    Level("nonsense", "address", seconds=600),
    Level("laws", seconds=900),
)
QUICK = 2  # levels, and stages of the workshop


class Survey(NamedTuple):
    """Of the kernels as they are."""

    at_load: set[int]  # mutants of what is computed once and for all; no switch comes in time
    seconds: dict[str, float]  # by instance
    met: dict[int, list[str]]  # by mutant: the instances that come to its place, the fastest first

    def trial(self, number: int, level: Level) -> Trial:
        fitting, total = [], 0.0
        for name in self.met[number]:
            if name.endswith(level.dtypes) and len(fitting) < level.most:
                total += self.seconds[name]
                if fitting and total > level.budget:
                    break
                fitting.append(name)
        return Trial(number, fitting, level.seed, level.seconds + level.times * total)


def survey(made: Path, names: Iterable[str], bounds: Path, count: int) -> Survey:
    """Runs instances in a library with switches for mutants 1 .. count, all of them off."""

    def work() -> None:
        testing.use_emulated(made)
        copy_marks, marks = ctypes.CDLL(str(made)).mutants_met, (ctypes.c_ubyte * (count + 1))()
        known, seconds, met = torch.load(bounds, weights_only=False), {}, {}
        every = {str(instance): instance for instance in instances.instances()}
        copy_marks(marks, count + 1)
        at_load = [number for number, mark in enumerate(marks) if mark]
        for name in names:
            begin = time.process_time()
            instances.check_one(every[name], [1], known)
            seconds[name] = time.process_time() - begin
            copy_marks(marks, count + 1)
            met[name] = [number for number, mark in enumerate(marks) if mark]
        found.write_text(json.dumps([at_load, seconds, met]))

    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "survey.json")
        if problem := verdict(forked(work, 1200)):
            raise SystemExit(f"the kernels as they are: {problem}")
        at_load, seconds, numbers = json.loads(found.read_text())
    met = defaultdict(list)
    for name in sorted(seconds, key=seconds.get):
        for number in numbers[name]:
            met[number].append(name)
    return Survey(set(at_load), seconds, met)


class Trials:
    """The processes that try switches in a library, one for each variant; started when needed."""

    def __init__(self, made: dict[str, Path], bounds: Path) -> None:
        self.made, self.bounds = made, bounds
        self.processes = {}

    def run(self, trial: Trial, variant: str) -> str | None:
        """What is wrong, or None."""
        process = self.processes.get(variant)
        if process is None or process.poll() is not None:
            command = [sys.executable, trials.__file__, self.made[variant], self.bounds]
            process = build.start(command, variant, extra=ENVIRONMENT)
            self.processes[variant] = process
        process.stdin.write(json.dumps(trial) + "\n")
        return verdict(Said(*json.loads(process.stdout.readline())))

    def close(self) -> None:
        for process in self.processes.values():
            process.communicate()  # they end with their input


class Judge:
    """Tries mutants that are switches."""

    def __init__(
        self, operators: tuple[str, ...], made: dict[str, Path], found: Survey, bounds: Path
    ) -> None:
        self.operators, self.made, self.survey = operators, made, found
        self.trials, self.passed = Trials(made, bounds), set()

    def judge(self, number: int, levels: Iterable[Level]) -> str:
        """Who catches the mutant, or SURVIVES, or NOT_MET if no instance could have caught it.

        Raises RuntimeError if what catches it also objects to the kernels as they are.
        """
        for level in levels:
            trial = self.survey.trial(number, level)
            if problem := self.try_out(trial, level):
                key = level.name, *trial.names
                if key not in self.passed and (other := self.try_out(trial.off(), level)):
                    raise RuntimeError(f"the kernels as they are: {level.name}: {other}")
                self.passed.add(key)
                return f"{level.name}: {problem}"
        return SURVIVES if self.survey.met[number] else NOT_MET

    def try_out(self, trial: Trial, level: Level) -> str | None:
        made, setting = self.made[level.variant], {SETTING: str(trial.number)}
        if level.name == "laws":
            return workshop.try_laws(made, self.operators, level.seconds, **setting)
        if level.name == "nonsense":
            return workshop.try_nonsense(made, self.operators, level.seconds, **setting)
        return self.trials.run(trial, level.variant) if trial.names else None


# ---- the run -------------------------------------------------------------------------------------


def bounds_of(operators: tuple[str, ...]) -> Path:
    """What the definitions give for all instances of these operators; computed once."""
    sources = [INSTANCES, build.HERE.parent / "laws.py", *build.ROOT.glob("hope_ext/**/*.py")]
    parts = [*operators, *(hashlib.sha256(s.read_bytes()).hexdigest() for s in sorted(sources))]
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    file = build.CACHE / f"bounds-{name}.pt"
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=build.CACHE) as folder:
            made = Path(folder, "bounds.pt")
            command = [sys.executable, INSTANCES, library.make(), "--bounds", made, "--seeds"]
            command += ["--match", f"^({'|'.join(operators)})"]
            run = functools.partial(build.run, command)
            if problem := verdict(within(run, 3600, ENVIRONMENT)):
                raise SystemExit(problem)
            os.replace(made, file)
    return file


class Worker:
    """What a process of the pool has."""

    @classmethod
    def start(cls, folder: Path, bounds: Path, judge: Judge, options: argparse.Namespace) -> None:
        trials.warm_up()
        cls.folder, cls.bounds, cls.judge_of_switches = folder, bounds, judge
        cls.levels = [LEVELS[number] for number in options.stages]
        cls.stages = [STAGES[number] for number in options.stages]
        cls.end = time.monotonic() + 60 * options.minutes
        cls.kernels, cls.workshop = options.kernels, None

    @classmethod
    def judge(cls, task: tuple[int, Mutant]) -> tuple[Mutant, bool, str]:
        """The mutant, whether there was time for it, and who caught it, or SURVIVES or NOT_MET."""
        number, mutant = task
        if time.monotonic() > cls.end:
            return mutant, False, SURVIVES
        if number:
            return mutant, True, cls.judge_of_switches.judge(number, cls.levels)
        if cls.workshop is None:
            folder = Path(tempfile.mkdtemp(dir=cls.folder))
            cls.workshop = Workshop(folder, cls.bounds, cls.kernels)
            cls.workshop.check(cls.stages, mutant.file)
        return mutant, True, cls.workshop.judge(mutant, cls.stages) or SURVIVES


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: all that kernels consist of")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--list", action="store_true", help="only say which mutants there are")
    everything, first = range(len(LEVELS)), range(QUICK)
    parser.add_argument("--stages", type=int, nargs="+", default=everything, help="from 0 on")
    parser.add_argument("--quick", dest="stages", action="store_const", const=first,
                        help="only the instances: seconds for one")  # fmt: skip
    parser.add_argument("--switches", action="store_true", help="only what needs no compilation")
    parser.add_argument("--kernels", default="", help="regular expression: in which of csrc's .cu")
    parser.add_argument("--only", type=Path, help="a list of mutants, as a run prints it")
    parser.add_argument(
        "--resume", type=Path, help="what a run has printed: try what it has not caught"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    return parser.parse_args()


def earlier(log: Path) -> dict[str, str]:
    """Mutants that a run has caught, as it names them, and who did."""
    tried = re.findall(r"^\[\d+/\d+\] (csrc/.*)\n    (.*)$", log.read_text(), re.MULTILINE)
    return {mutant: who for mutant, who in tried if who not in (SURVIVES, NOT_MET)}


def report(files: list[Path], caught: Counter, survivors: list[tuple[Mutant, str]]) -> None:
    """The rows of survivors.md's table, and its entries."""
    explained = known()
    for file in files:
        every = list(mutations.mutants(file))
        here = sum(mutant.key in explained for mutant in every)
        rest = len(every) - here - caught[file]
        print(f"| `{file.name}` | {len(every)} | {caught[file]} | {here} | {rest} |")
    print(f"\n{len(survivors)} survive:")
    for mutant, why in sorted(survivors, key=lambda s: (s[0].file, s[0].line)):
        print(f"- `{mutant.file.name}`: {mutant.entry}: {why}")


def main() -> int:
    options = parse()
    files = [file.resolve().relative_to(CSRC) for file in options.files]
    files = files or kernel_files()
    explained, only = known(), listed(options.only) if options.only else None
    wanted = {
        mutant
        for file in files
        for mutant in mutations.mutants(file)
        if mutant.key not in explained and (only is None or mutant.key in only)
    }
    if options.list:
        print("\n".join(map(str, sorted(wanted, key=lambda m: (m.file, m.line)))))
        return 0
    board = Switchboard(files, options.kernels)
    operators = mutations.operators_of(board.sources)
    variants = sorted({LEVELS[number].variant for number in options.stages} | {"plain"})
    made = {variant: board.make(variant) for variant in variants}
    trials.warm_up()
    survivors, caught, tried = [], Counter(), 0

    def judged(mutant: Mutant, who: str) -> None:
        if who in (SURVIVES, NOT_MET):
            survivors.append((mutant, who))
        else:
            caught[mutant.file] += 1

    with tempfile.TemporaryDirectory() as folder:
        bounds = bounds_of(operators)
        names = list(torch.load(bounds, weights_only=False))
        found = survey(made["plain"], names, bounds, len(board.numbers))
        fixed = [(0, m) for m in [*board.fixed, *map(board.live.get, found.at_load)] if m in wanted]
        live = [(n, m) for n, m in board.live.items() if m in wanted and n not in found.at_load]
        for part in (live, fixed):
            random.Random(options.seed).shuffle(part)
        todo = live if options.switches else live + fixed
        before = earlier(options.resume) if options.resume else {}
        for mutant in wanted:
            if said := before.get(str(mutant)):
                judged(mutant, said)
        todo = [(n, m) for n, m in todo if str(m) not in before]
        start = (Path(folder), bounds, Judge(operators, made, found, bounds), options)
        with multiprocessing.get_context("fork").Pool(options.jobs, Worker.start, start) as pool:
            for mutant, was_tried, who in pool.imap_unordered(Worker.judge, todo):
                if not was_tried:
                    continue
                tried += 1
                judged(mutant, who)
                print(f"[{tried}/{len(todo)}] {mutant}\n    {who}", flush=True)
    report(files, caught, survivors)
    return 0


if __name__ == "__main__":
    sys.exit(main())
