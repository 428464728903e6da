"""Mutation testing's own tools: the mutants of a line, their switches, and who notices them."""

from __future__ import annotations

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from emulator import build, instances, mutate, mutations
from emulator.switches import HEADER, RUN_TIME, Switchboard

INSTANCE = "multifreq-sgd-float32-gradients-float32$"

FUNCTION = """\
int walk(int a, int b) {
    int sum = 0, product = 1;
    for (int i = 0; i < 5; i++) {
        if (i == a && b > 2 || i != b) sum += i * 2 + a - 1;
        if (a >= i) sum = max(sum, b);
        else sum -= 7;
        if (a <= i || b >= i && a != b) product *= 3;
        if (sum > 40) continue;
        product = product + min(i + 1, b) - 1;
        if (b == 4) __synccount();
    }
    return sum * 31 + product;
}
"""
PROGRAM = """\
#include <algorithm>
#include <cstdio>
int synchronised;
int __synccount() { return synchronised++; }
extern "C" void mutants_switch(int);
%(functions)s
int main() {
    for (int n = 0; n < %(count)s; n++) {
        mutants_switch(n);
        for (int a = -2; a < 7; a++)
            for (int b = -2; b < 7; b++) {
                const int all = synchronised, expected = walks[n](a, b), alone = synchronised;
                const int got = walk(a, b);
                if (got != expected || synchronised - alone != alone - all)
                    std::printf("%%d: walk(%%d, %%d) is %%d, not %%d\\n", n, a, b, got, expected);
                else if (got != walks[0](a, b)) differs[n] = true;
            }
    }
    for (int n = 1; n < %(count)s; n++) if (!differs[n]) std::printf("%%d: shows nowhere\\n", n);
}
"""


def changed(line: str) -> list[str]:
    return [change.of(line) for change in mutations.changes(line)]


def test_mutants_of_a_line():
    line = "    if (row < 8) __syncthreads();  // row < 8"
    assert changed(line) == [
        "    if (row < 8) ;  // row < 8",
        "    if (row <= 8) __syncthreads();  // row < 8",
        "    if (row < 9) __syncthreads();  // row < 8",
    ]
    assert changed("    total += part;") == ["    ;", "    total -= part;"]
    assert changed("// a < b, 8") == []


def test_a_switch_does_what_its_mutant_does(tmp_path):
    """Every mutant of a function, compiled as a function of its own, and as a switch in one."""
    every = list(mutations.mutants_in(FUNCTION, Path("walk.cpp")))
    numbers = {n: mutant for n, mutant in enumerate(every, 1) if mutant.change.switch}
    assert {mutant.line for mutant in numbers.values()} >= set(range(2, 11))
    text, spans = mutations.with_switches(FUNCTION, numbers)
    assert sum(map(len, spans.values())) == len(numbers)
    functions = [text]
    for n in range(len(every) + 1):
        lines = FUNCTION.splitlines()
        if n in numbers:
            lines[numbers[n].line - 1] = numbers[n].after
        functions.append("\n".join(lines).replace("walk(", f"walk{n}("))
    names = ", ".join(f"walk{n}" for n in range(len(every) + 1))
    functions += [f"int (*walks[])(int, int) = {{{names}}};", f"bool differs[{len(every) + 1}];"]
    source = tmp_path / "walk.cpp"
    source.write_text(PROGRAM % {"functions": "\n".join(functions), "count": len(every) + 1})
    program = build.build([source, RUN_TIME], flags=["-include", str(HEADER), "-w"])
    hidden = {n for n in range(1, len(every) + 1) if n not in numbers}
    said = build.run([program]).stdout.splitlines()
    assert {line for line in said if "shows nowhere" not in line} == set()
    assert len(said) < len(every) / 4, said
    assert {f"{n}: shows nowhere" for n in hidden} <= set(said)


def test_explained_survivors_are_in_the_sources():
    lines = {
        (file.name, line.strip())
        for file in mutations.kernel_files()
        for line in (mutations.CSRC / file).read_text().splitlines()
    }
    gone = [entry for entry in mutations.known() if entry[:2] not in lines]
    assert gone == [], "survivors.md explains lines that are no more"


def test_kernels_with_switches(emulator, tmp_path):
    """In a process of its own: only one library of kernels fits into each."""
    own = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, own) as pool:
        pool.submit(check_switches, tmp_path).result()


def check_switches(tmp_path: Path) -> None:
    """Off, kernels are what they were; on, a mutant is noticed; what makes a constant has none."""
    kernel = Path("multifreq/multifreq_cuda.cu")
    board = Switchboard([kernel])
    lines = (mutations.CSRC / kernel).read_text().splitlines()
    in_constants = {n for n, line in enumerate(lines, 1) if line.startswith("constexpr int")}
    assert in_constants <= {mutant.line for mutant in board.fixed}
    assert len(board.fixed) < len(board.numbers) / 4
    numbers = {(m.before.strip(), m.after.strip()): n for n, m in board.live.items()}

    made, bounds = {"plain": board.make("plain")}, tmp_path / "bounds.pt"
    torch.save({}, bounds)
    (name,) = (n for n in map(str, instances.instances()) if re.match(INSTANCE, n))
    found = mutate.survey(made["plain"], [name], bounds, len(board.numbers))
    judge = mutate.Judge(("multifreq",), made, found, bounds)
    try:
        mistake = numbers["p[i] -= pending[i];", ";"]
        assert judge.judge(mistake, mutate.LEVELS[:1]).startswith("few instances: Assertion")
        elsewhere = numbers["load(m, tensor.mean + at, live, whole);", ";"]
        assert judge.judge(elsewhere, mutate.LEVELS[:1]) == mutate.NOT_MET
    finally:
        judge.trials.close()


def test_a_resumed_run_tries_again_what_survived(tmp_path):
    log = tmp_path / "log"
    caught, survived = "csrc/a.cuh:1: `x < 1` -> `x <= 1`", "csrc/a.cuh:1: `x < 1` -> `x < 2`"
    log.write_text(
        f"[1/3] {caught}\n    few instances: hangs\n[2/3] {survived}\n    {mutate.SURVIVES}\n"
        f"| `a.cuh` | 2 | 1 | 0 | 1 |\n\n1 survive:\n- `a.cuh`: `x < 1` -> `x < 2`: SURVIVES\n"
    )
    assert mutate.earlier(log) == {caught: "few instances: hangs"}
    assert mutations.listed(log) == {("a.cuh", "x < 1", "x < 2")}
