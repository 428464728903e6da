"""Kernels with all their mutants in them, of which the environment switches one on.

To compile every mutant by itself takes hours. Here each becomes a switch in the code
(`mutations.Switch`, `switches.h`): one compilation has thousands of them, and to try one takes what
its instances take. Where a constant is needed, as a template's argument, the compiler refuses the
switch; such mutants are the `fixed` ones, each to be compiled alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from emulator import build, library, mutations
from emulator.mutations import CSRC, Mutant, Span

SETTING = "EMULATOR_MUTANT"  # the number of the one that is on
RUN_TIME = build.HERE / "switches.cpp"
HEADER = build.HERE / "switches.h"
SYSTEM = ("<algorithm>", "<cuda_runtime.h>", "<cuda_bf16.h>", "<cuda_fp16.h>")
# Nobody debugs a mutant. An array whose size is a switch is another type than the kernel's.
FLAGS = ("-O1", "-g0", "-Werror=vla")
CACHE = build.CACHE / "mutants"
PLACE = re.compile(r"^(.+?):(\d+):(\d+): +(.*)$", re.MULTILINE)


class Switchboard:
    """The kernels that some files are part of, in a copy with switches in these files."""

    def __init__(self, files: Iterable[Path], kernels: str = "") -> None:
        """Args: files: relative to csrc; kernels: which ones, by their names."""
        self.files = sorted(set(files))
        every = (mutant for file in self.files for mutant in mutations.mutants(file))
        self.numbers = dict(enumerate(every, 1))
        self.live = {n: m for n, m in self.numbers.items() if m.change.switch}
        self.spans: dict[Path, dict[int, list[Span]]] = {}  # of a file's lines
        # Those of float16 are what the ones of bfloat16 are.
        sources = mutations.kernels_with(self.files, kernels)
        self.sources = [source for source in sources if "_fp16_" not in source.name]
        # Of what is in a precompiled header, the compiler does not say that it was read.
        headers = [file.read_bytes() for file in (HEADER, build.HERE / "cuda_emulator.h")]
        of = "\n".join(map(str, (*self.files, *self.sources)))
        self.folder = CACHE / _digest(of.encode(), *headers)
        shutil.copytree(CSRC, self.folder, dirs_exist_ok=True)
        self.options = library.options()
        self.options["flags"] += FLAGS
        names = (*SYSTEM, f'"{HEADER}"')
        self.precompiled = build.precompile(names, self.folder, **self.options)
        self.settle()

    @property
    def fixed(self) -> list[Mutant]:
        """The mutants that have no switch."""
        return [mutant for number, mutant in self.numbers.items() if number not in self.live]

    def make(self, variant: str) -> Path:
        """The library with the switches, see `library.make`."""
        include = self.precompiled if variant == "plain" else ["-include", str(HEADER)]
        options = {**self.options, "flags": [*self.options["flags"], *include]}
        # First what has switches: of equal inline functions the linker keeps the first. The others
        # are not run, so that a sanitizer need not look at them.
        instead = {
            source: build.compile_object(
                self.folder / source.relative_to(CSRC), variant, csrc=self.folder, **options
            )
            for source in self.sources
        }
        for source in library.kernels():
            if source not in instead:
                instead[source] = build.compile_object(source, **library.options())
        run_time = build.compile_object(RUN_TIME, "plain")
        return library.make(variant, instead=instead, link=[str(run_time), "-Wl,--strip-debug"])

    # ---- which switches the compiler takes ----

    def write(self) -> None:
        for file in self.files:
            live = {n: mutant for n, mutant in self.live.items() if mutant.file == file}
            text, self.spans[file] = mutations.with_switches((CSRC / file).read_text(), live)
            (self.folder / file).write_text(text)

    def settle(self) -> None:
        """Takes out the switches that the compiler refuses, until it takes the rest."""
        rules = (CSRC / file for file in mutations.kernel_files())
        key = _digest(*(file.read_bytes() for file in (*rules, HEADER, Path(mutations.__file__))))
        known = self.folder / "refused.json"
        refused = set()
        if known.exists() and (found := json.loads(known.read_text()))["key"] == key:
            refused = set(found["refused"])
            todo = []
        else:
            todo = list(self.sources)
        options = {**self.options, "flags": [*self.options["flags"], *self.precompiled]}
        accepted = 0  # sources in succession
        while True:
            self.live = {n: mutant for n, mutant in self.live.items() if n not in refused}
            self.write()
            if accepted == len(todo):
                break
            source = self.folder / todo[0].relative_to(CSRC)
            if said := build.complaints(source, csrc=self.folder, **options):
                blamed = self.blamed(said)
                if not blamed:
                    raise build.CompileError(said)
                refused |= blamed
                accepted = 0
            else:
                accepted += 1
                todo = [*todo[1:], todo[0]]
        known.write_text(json.dumps({"key": key, "refused": sorted(refused)}))

    def blamed(self, said: str) -> set[int]:
        """The mutants whose switches the compiler refuses."""
        blamed = set()
        for places in _complaints(said):
            for by_column in (True, False):
                spans = [self.at(*place, by_column=by_column) for place in places]
                if found := next(filter(None, spans), None):
                    blamed |= found
                    break
        return blamed

    def at(self, file: str, line: int, column: int, *, by_column: bool) -> set[int]:
        """The switches at a place in the copy."""
        path = Path(file)
        if self.folder not in path.parents:
            return set()
        spans = self.spans.get(path.relative_to(self.folder), {}).get(line, [])
        return {
            span.number
            for span in spans
            if not by_column or span.first < column <= span.behind  # counted from 1
        }


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _complaints(said: str) -> Iterator[list[tuple[str, int, int]]]:
    """The places that each error names: its own, those it follows from, the innermost first."""
    before, errors, last = [], [], []
    for file, line, column, text in PLACE.findall(said):
        place = file, int(line), int(column)
        kind = text.partition(":")[0]
        if kind == "note":
            last.append(place)
        elif kind in ("error", "fatal error", "warning"):
            last, before = [place, *reversed(before)], []
            if kind != "warning" or "[-Werror" in text:
                errors.append(last)
        else:
            before.append(place)
    yield from errors
