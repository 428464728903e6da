"""The mutants of the CUDA kernels: what is changed in a line, and how a switch in the code does it.

Every mutant is one change in one line: a barrier or a wait less, a statement less, a comparison or
a sign turned round, a number greater by one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from emulator import build, library

CSRC = build.ROOT / "csrc"
KNOWN = build.HERE / "survivors.md"
PRIMITIVES = {Path("common/primitives.cuh"), Path("common/launch.cuh")}  # they have self-tests

SYNCHRONISATION = re.compile(
    r"(__sync\w+\(\)|named_barrier_\w+\([^;]*\)|cp_async_(wait<\w+>|commit)\(\)|wait_for_\w+<[^;]*\));"
)
# A whole statement in a line: an assignment, a call, a jump; no declaration.
STATEMENT = re.compile(
    r"\s*(if \(.*\) |else )?(continue|return|[\w:<>\[\]().>-]+ ?([-+*]?= .*|\(.*\)));\s*"
)
NUMBER = re.compile(r"(?<![\w.#])(\d+)(?![\w.])")


class Switch(NamedTuple):
    """What stands around the unchanged code, with # for the mutant's number; see switches.h."""

    before: str
    after: str


REMOVED = Switch("if (mutant::on(#)) {} else ", "")  # an `else` that follows finds its own `if`
# A word or an operator, what it becomes, and its switch; None: an argument of a template.
SWAPS = {
    " < ": (" <= ", Switch("", "mutant::Less(#) < ")),
    " <= ": (" < ", Switch("", "mutant::LessEqual(#) <= ")),
    " > ": (" >= ", Switch("", "mutant::Greater(#) > ")),
    " >= ": (" > ", Switch("", "mutant::GreaterEqual(#) >= ")),
    " == ": (" != ", Switch("", "mutant::Equal(#) == ")),
    " != ": (" == ", Switch("", "mutant::Unequal(#) != ")),
    " && ": (" || ", Switch("", "mutant::both(#) || mutant::rest_of_both(#) && ")),
    " || ": (" && ", Switch(" && mutant::either(#)", "mutant::rest_of_either(#) && ")),
    " + ": (" - ", Switch("", "mutant::Plus(#) + ")),
    " - ": (" + ", Switch("", "mutant::Minus(#) - ")),
    " += ": (" -= ", Switch("", "mutant::Increase(#) += ")),
    " *= ": (" += ", Switch("", "mutant::Multiply(#) *= ")),
    "<true": ("<false", None),
    "<false": ("<true", None),
    "min(": ("max(", Switch("mutant::", "#, ")),
    "max(": ("min(", Switch("mutant::", "#, ")),
}


@dataclass(frozen=True)
class Change:
    """Of a line's characters from ``begin`` on, before ``end``."""

    begin: int
    end: int
    text: str
    switch: Switch | None

    @property
    def removes(self) -> bool:
        return self.text == ";"

    def of(self, line: str) -> str:
        return line[: self.begin] + self.text + line[self.end :]


def changes(line: str) -> Iterator[Change]:
    """The mutants of a line of code."""
    code, _, _ = line.partition("//")
    if not code.strip() or code.lstrip().startswith(("#", "static_assert", "template", "*")):
        return
    for found in SYNCHRONISATION.finditer(code):
        yield Change(*found.span(), ";", REMOVED)
    if STATEMENT.fullmatch(code) and not SYNCHRONISATION.search(code):
        begin = len(code) - len(code.lstrip())
        of_else = code[begin:].startswith("else ")
        switch = Switch("else " + REMOVED.before.replace("else ", ""), "") if of_else else REMOVED
        yield Change(begin, len(line), ";", switch)
    for old, (new, switch) in SWAPS.items():
        for found in re.finditer(re.escape(old), code):
            yield Change(*found.span(), new, switch)
    for found in NUMBER.finditer(code):
        more = str(int(found[1]) + 1)
        yield Change(*found.span(), more, Switch(f"(mutant::on(#) ? {more} : ", ")"))


def with_switches(text: str, live: Mapping[int, Mutant]) -> tuple[str, dict[int, list[Span]]]:
    """A file's text with switches for mutants by their numbers, and where these are, by line."""
    by_line: dict[int, dict[int, Change]] = defaultdict(dict)
    for number, mutant in live.items():
        by_line[mutant.line][number] = mutant.change
    lines, spans = text.splitlines(), {}
    for i, of_line in by_line.items():
        lines[i - 1], spans[i] = switched(lines[i - 1], of_line)
    return "\n".join(lines) + "\n", spans


class Span(NamedTuple):
    """Columns of a line with switches that are about one mutant, counted from 0."""

    first: int
    behind: int
    number: int


def switched(line: str, live: Mapping[int, Change]) -> tuple[str, list[Span]]:
    """The line with switches for some of its changes, by their numbers."""
    pieces = []
    for number, change in live.items():
        before, after = (text.replace("#", str(number)) for text in change.switch)
        # At one place, what ends comes first, and of several the innermost.
        pieces.append((change.end, 0, -change.begin, after, number))
        pieces.append((change.begin, 1, -change.end, before, number))
    made, done, begins, spans = "", 0, {}, {}
    for at, opens, _, text, number in sorted(pieces):
        made, done = made + line[done:at], at
        if opens:
            begins[number] = len(made)
        made += text
        if number not in spans and (not opens or live[number].removes):
            spans[number] = Span(begins[number], len(made), number)
    return made + line[done:], list(spans.values())


@dataclass(frozen=True)
class Mutant:
    file: Path  # within csrc
    line: int
    before: str
    change: Change

    @property
    def after(self) -> str:
        return self.change.of(self.before)

    @property
    def entry(self) -> str:
        return f"`{self.before.strip()}` -> `{self.after.strip()}`"

    def __str__(self) -> str:
        return f"csrc/{self.file}:{self.line}: {self.entry}"

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies it when lines have moved."""
        return self.file.name, self.before.strip(), self.after.strip()


def mutants(file: Path) -> Iterator[Mutant]:
    """All of a file; ``file`` is relative to csrc."""
    yield from mutants_in((CSRC / file).read_text(), file)


def mutants_in(text: str, file: Path) -> Iterator[Mutant]:
    lines = text.splitlines()
    for number, (line, following) in enumerate(zip(lines, [*lines[1:], ""], strict=True), 1):
        # Without `if (...) ...;` an `else` would hang in the air, but not beside a switch.
        branches = line.lstrip().startswith(("if (", "else if"))
        hangs = branches and following.split()[:1] == ["else"]
        for change in {change.of(line): change for change in changes(line)}.values():
            whole = change.removes and change.end == len(line)
            yield Mutant(
                file, number, line, replace(change, switch=None) if whole and hangs else change
            )


def listed(file: Path) -> set[tuple[str, str, str]]:
    """The keys of mutants in a list like survivors.md, or like what a run prints in the end."""
    entries = re.findall(r"^- `([^`]+)`: `([^`]+)` -> `([^`]+)`", file.read_text(), re.MULTILINE)
    return set(entries)


def known() -> set[tuple[str, str, str]]:
    """The survivors that have been explained."""
    return listed(KNOWN)


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


def kernels_with(files: Iterable[Path], match: str = "") -> list[Path]:
    """The kernels that files are part of, and whose names match."""
    changed = set(files)
    kernels = (s for s in library.kernels() if re.search(match, s.name))
    return [s for s in kernels if changed & included(s.relative_to(CSRC))]


def operators_of(kernels: Iterable[Path]) -> tuple[str, ...]:
    """Of these kernels, as their cases' names begin."""
    return tuple(sorted({source.parent.name for source in kernels}))


def kernel_files() -> list[Path]:
    files = {file for s in library.kernels() for file in included(s.relative_to(CSRC))}
    return sorted(file for file in files - PRIMITIVES if file.suffix in (".cu", ".cuh"))
