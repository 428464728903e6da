"""Tries mutants that no switch can make (`switches.py`): each is compiled by itself.

What is compiled here is thrown away again: thousands of mutants would fill the disk.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from emulator import build, instances, library, mutations
from emulator.mutations import CSRC, Mutant
from emulator.processes import forked, verdict, within
from hope_ext import testing

INSTANCES = build.HERE / "instances.py"
# Threads that wait for each other are slow where several mutants want the processors.
ENVIRONMENT = {"PYTHONPATH": f"{build.ROOT}:{build.HERE.parent}", "OMP_NUM_THREADS": "1"}
# Compiling is most of the work; nobody debugs a mutant.
FLAGS = ("-O1", "-g0")
LINK = ("-Wl,--strip-debug",)
FAST_LINKER = "-fuse-ld=gold"
HEADERS = ("<algorithm>", "<cuda_runtime.h>", "<cuda_bf16.h>", "<cuda_fp16.h>", '"cuda_emulator.h"')
# Which laws an operator's kernels have to keep; of test_ops.py all.
TESTS = {
    "conv": ("conv",),
    "titans": ("titans", "titans_operator", "titans_deep"),
    "selfmod": ("selfmod", "selfmod_cuda"),
    "cms": ("cms", "cms_cuda"),
    "multifreq": ("multifreq",),
    "newton_schulz": ("newton_schulz",),
}
SAME_CODE = "changes no code"


@dataclass(frozen=True)
class Stage:
    """A build of a mutant, and what tries it."""

    name: str
    seconds: float  # A mutant that needs more hangs; some spoil the heap and wait for it forever.
    variant: str = "plain"
    small: bool = True  # only float, and of the sizes only small ones
    seeds: tuple[int, ...] = (1,)
    backward: bool = True  # False: only the kernels of the forward, if that makes fewer sources
    nonsense: bool = False
    tests: bool = False

    @property
    def match(self) -> str:
        """The instances, for ``instances.check``."""
        sizes = r"titans-\w+-32x|titans-(deep|norm)-(?!128)|conv|cms|selfmod-(?!.*128)|multi|newton"
        return rf"^({sizes}).*-float32$" if self.small else ""

    def left_out(self) -> list[tuple[Path, str, str]]:
        """Files within csrc, what makes the other instances there, and what is there instead."""
        if not self.small:
            return []
        launch, element = Path("titans/titans_launch.cuh"), Path("common/for_element.cuh")
        key, layer = r"return body\(\w+, Constant<\w+>\(\)\);", Path("common/layer_launch.cuh")
        left_out = [(launch, rf"case (?:16|64|128):\s*{key}", "")]
        left_out += [(layer, r"for_depth\(Constant<128>\(\)\)", "for_depth(Constant<64>())")]
        for name, kind in (("bfloat16", "bf16"), ("float16", "fp16")):
            left_out += [
                (launch, rf"case Element::{name}:\s*return for_key\(Type<\w+>\(\)\);", ""),
                (element, rf"case Element::{name}:\s*return body\(Type<\w+>\(\)\);", ""),
                (Path("conv/conv_cuda.cu"), rf"(?<=\s)run<{kind}>\(p, backward, queue\)(?=;)", ""),
            ]
        return left_out


STAGES = (
    Stage("forward", 3, backward=False),
    Stage("few instances", 12),
    Stage("all instances", 120, small=False, seeds=(3,)),
    Stage("few under address", 200, "address"),
    Stage("few under races", 300, "races"),
    Stage("nonsense", 600, "address", small=False, nonsense=True),
    Stage("laws", 900, small=False, tests=True),
)


def compiling() -> dict[str, list[str]]:
    """How mutants are compiled."""
    options = library.options()
    options["flags"] += FLAGS
    return options


def try_laws(made: Path, operators: Iterable[str], seconds: float, **settings: str) -> str | None:
    """What the operators' laws find wrong, in a library of `library.make`, or None."""
    names = [name for operator in operators for name in TESTS[operator]]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-k", f"emulated and ({' or '.join(operators)})"]
    command += [build.HERE.parent / f"test_{name}.py" for name in ("ops", *names)]
    run = functools.partial(build.run, command)
    settings["HOPE_EMULATED_LIBRARY"] = str(made)
    return verdict(within(run, seconds, {**ENVIRONMENT, **settings}))


def try_nonsense(
    made: Path, operators: Iterable[str], seconds: float, **settings: str
) -> str | None:
    """Whether nonsense in bounds or positions makes a library of `address` touch other memory."""
    command = [sys.executable, build.HERE / "nonsense.py", made, *operators]
    run = functools.partial(build.run, command, "address", preload=True)
    return verdict(within(run, seconds, {**ENVIRONMENT, **settings}))


class Workshop:
    """Copies of csrc, one for each stage, in which one line at a time is changed."""

    def __init__(self, folder: Path, bounds: Path, kernels: str) -> None:
        """Args: kernels: which ones, by their names."""
        folder.mkdir(exist_ok=True)
        self.kernels = kernels
        self.copies, self.bounds_file = {}, bounds
        self.bounds = torch.load(bounds, weights_only=False)
        self.link = [*LINK, *([FAST_LINKER] if build.supports(FAST_LINKER) else [])]
        self.options = compiling()
        self.options["flags"] += build.precompile(HEADERS, folder, **self.options)
        for number, stage in enumerate(STAGES):
            self.copies[stage] = shutil.copytree(CSRC, folder / str(number))
            for file, others, instead in stage.left_out():
                source, text = self.copies[stage] / file, (CSRC / file).read_text()
                assert re.search(others, text), f"{file} has changed: {others}"

                def lines(found: re.Match[str], instead: str = instead) -> str:
                    return instead + "\n" * found[0].count("\n")

                source.write_text(re.sub(others, lines, source.read_text()))

    def check(self, stages: Iterable[Stage], file: Path) -> None:
        """Raises RuntimeError if a stage objects to the kernels, of which a file is part."""
        for stage in stages:
            if self.sources(stage, [file]) and (problem := self.try_out(stage, [file])):
                raise RuntimeError(f"the kernels as they are: {stage.name}: {problem}")

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
            whole = not stage.small and stage.variant == "plain" and not stage.tests
            before = self.compiled(stage, [mutant.file]) if whole else {}
            try:
                file.write_text("\n".join(lines) + "\n")
                problem = self.try_out(stage, [mutant.file], before)
            except build.CompileError:
                problem = "does not compile"
            finally:
                file.write_text(original)
            if problem:
                return problem if problem == SAME_CODE else f"{stage.name}: {problem}"
        return None

    def sources(self, stage: Stage, files: Iterable[Path]) -> list[Path]:
        """The kernels that files are part of; none if the stage has nothing of its own to say."""
        sources = mutations.kernels_with(files, self.kernels)
        if stage.small:
            sources = [s for s in sources if not re.search("_(bf16|fp16)_", s.name)]
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
        self, stage: Stage, files: list[Path], before: Mapping[Path, Path] | None = None
    ) -> str | None:
        """What is wrong, or None. `before`: the objects without the change, if of interest."""
        objects, made, before = self.compiled(stage, files), None, before or {}
        try:
            if before and all(before[s].read_bytes() == o.read_bytes() for s, o in objects.items()):
                return SAME_CODE
            made = library.make(stage.variant, instead=objects, link=self.link)
            operators = mutations.operators_of(objects)
            if stage.tests:
                return try_laws(made, operators, stage.seconds)
            return self.try_instances(made, stage, operators)
        finally:
            for source, output in objects.items():
                if before.get(source) != output:
                    output.with_suffix(".o.log").unlink(missing_ok=True)
                    output.unlink(missing_ok=True)
            if made:
                made.unlink()

    def try_instances(self, made: Path, stage: Stage, operators: tuple[str, ...]) -> str | None:
        if stage.nonsense:
            return try_nonsense(made, operators, stage.seconds)
        match = f"(?=^({'|'.join(operators)})){stage.match}"

        def check() -> None:
            testing.use_emulated(made)
            instances.check(match, stage.seeds, self.bounds, backward=stage.backward)

        if stage.variant == "plain":
            return verdict(forked(check, stage.seconds))
        command = [sys.executable, INSTANCES, made, "--bounds", self.bounds_file]
        command += ["--match", match, "--seeds", *stage.seeds]
        run = functools.partial(build.run, command, stage.variant, preload=True)
        return verdict(within(run, stage.seconds, ENVIRONMENT))
