"""The steps of `make gpu`, without a GPU: their commands are run, or stand-ins for them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import build_config
from benchmarks import gpu_steps, on_gpu, sources
from benchmarks.gpu_steps import CUT, GREEN, RED, SKIPPED, UNAVAILABLE, Done, Outcome, Steps
from hope_ext import _load
from hope_ext.testing import CASES

# Operators that have CUDA kernels.
STEMS = [s for s in sources.stems() if any(c.stem == s and c.runs_on("cuda") for c in CASES)]


def script(path: Path, body: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(autouse=True)
def log(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "log"
    folder.mkdir()
    monkeypatch.setattr(gpu_steps, "LOG", folder / "gpu.txt")
    return folder / "gpu.txt"


@pytest.fixture
def steps(tmp_path) -> Steps:
    return Steps(["conv", "titans"], "9.0a", tmp_path)


def answers(steps: Steps, monkeypatch, done: Done) -> list[list[str]]:
    """Lets every command end so; returns the list in which their words will be."""
    commands = []
    monkeypatch.setattr(steps, "run", lambda words, *_, **__: commands.append([*words]) or done)
    return commands


# ---- running commands ----------------------------------------------------------------------------


def test_commands_run_in_the_checkout_with_its_packages(steps, root, log, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setenv("HOPE_REFERENCE", "1")
    keys = "[os.environ.get(k) for k in ('TORCH_CUDA_ARCH_LIST', 'HOPE_REFERENCE', 'A')]"
    code = f"import os, sys; print(os.getcwd()); print(*sys.path, sep=os.pathsep); print({keys})"
    done = steps.run([sys.executable, "-c", code], 60, A="b")
    assert done.status == 0
    where, paths, variables = done.output.splitlines()
    assert where == str(root)
    packages = [path for path in paths.split(os.pathsep) if path][:3]
    assert packages == [str(root), str(root / "python"), str(root / "elsewhere")]
    assert variables == "['9.0a', None, 'b']"
    assert done.output in log.read_text()


def test_a_command_is_ended_at_its_limit_with_its_children(steps, tmp_path):
    child = tmp_path / "child"
    done = steps.run(["sh", "-c", f"sleep 600 & echo $! >{child}; echo begun; wait"], 2)
    assert done.status is None
    assert done.output == "begun\n"
    stat = Path(f"/proc/{child.read_text().strip()}/stat")
    deadline = time.monotonic() + 60
    while stat.exists() and stat.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_a_build_that_fails_is_red_and_one_without_time_is_cut(steps, root, tmp_path, monkeypatch):
    commands = answers(steps, monkeypatch, Done(1, "x" * 9000 + "the reason"))
    monkeypatch.setattr(gpu_steps, "ROOT", tmp_path)
    made = tmp_path / "build/.built"
    made.parent.mkdir()
    made.touch()
    outcome = steps.build(60)
    assert outcome.status == RED
    assert outcome.facts["output_tail"].endswith("the reason")
    assert not made.exists()  # make is to build anew
    assert commands == [[sys.executable, "setup.py", "build_ext", "--inplace", "--force"]]
    answers(steps, monkeypatch, Done(None, ""))
    assert steps.build(60).status == CUT


def test_the_environment_is_a_line_of_json(steps, monkeypatch):
    output = 'a warning\n{"cuda_stems": ["conv"]}\na warning at exit\n'
    answers(steps, monkeypatch, Done(0, output))
    expected = Outcome(GREEN, "CUDA kernels: conv", {"cuda_stems": ["conv"]})
    assert steps.environment(60) == expected
    assert steps.kernels == ["conv"]


def test_an_extension_that_does_not_load_is_red(steps, monkeypatch):
    answers(steps, monkeypatch, Done(1, "ImportError: undefined symbol"))
    assert steps.environment(60).status == RED


# ---- laws ----------------------------------------------------------------------------------------

TESTS = """
import pytest
@pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=pytest.mark.on_gpu)])
@pytest.mark.parametrize("case", ["conv-silu", "titans-plain", "titans-carried"])
def test_law(backend, case):
    assert backend == "cuda"
    {body}
"""


@pytest.mark.parametrize(
    ("body", "status", "passed", "conv"),
    [
        ("pass", GREEN, 3, 1),
        ("assert case != 'titans-plain'", RED, 1, 1),
        ("pytest.skip('no kernels')", SKIPPED, 0, 0),
    ],
)
def test_laws_are_counted_by_operator(steps, tmp_path, body, status, passed, conv):
    path = tmp_path / "test_ops.py"
    path.write_text(TESTS.format(body=body))
    outcome = steps.pytest([str(path)], 120)
    assert outcome.status == status, outcome
    assert outcome.detail.startswith(f"{passed} passed")
    assert outcome.facts["passed_by_stem"]["conv"] == conv
    if status == RED:
        assert "1 failed" in outcome.detail
        assert outcome.detail.endswith("test_law[titans-plain-cuda]")


def test_laws_that_cannot_be_collected_are_red(steps, tmp_path):
    (tmp_path / "test_ops.py").write_text("import no_such_module")
    outcome = steps.pytest([str(tmp_path / "test_ops.py")], 120)
    assert outcome.status == RED
    assert "no_such_module" in outcome.facts["output_tail"]


def test_laws_without_time_are_cut_short(steps, tmp_path):
    path = tmp_path / "test_ops.py"
    path.write_text(TESTS.format(body="import time; time.sleep(600)"))
    outcome = steps.pytest([str(path)], 1)
    assert (outcome.status, outcome.detail) == (CUT, "0 passed, 0 failed, 0 skipped within 1 s")


def test_a_crash_keeps_what_was_found_before(steps, tmp_path):
    crash = "if case == 'titans-carried': __import__('os')._exit(9)"
    path = tmp_path / "test_ops.py"
    path.write_text(TESTS.format(body=crash))
    outcome = steps.pytest([str(path)], 120)
    assert outcome.status == RED
    assert outcome.detail == "2 passed, 0 failed, 0 skipped; pytest's exit status 9"
    assert "titans-carried" in outcome.facts["output_tail"]  # the one that crashed


def test_the_laws_are_the_repositorys_own(steps, root, monkeypatch):
    commands = answers(steps, monkeypatch, Done(0, ""))
    steps.laws(60)
    steps.own_tests(60)
    files = [word for command in commands for word in command if word.startswith("tests/")]
    assert (files[0], files[-1]) == ("tests/test_ops.py", "tests/test_emulated.py")
    assert {"tests/test_conv.py", "tests/test_titans.py", "tests/test_titans_operator.py"} < {
        *files
    }
    assert all((root / file).exists() for file in files)
    assert not any("selfmod" in file for file in files)


def test_the_laws_on_cuda_are_selected(root):
    """And each is about an operator; without a GPU they are skipped when they run."""
    words = ["-m", "pytest", "--collect-only", "-q", "-m", gpu_steps.MARK, "tests/test_ops.py"]
    done = subprocess.run([sys.executable, *words], cwd=root, capture_output=True, text=True)
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    for stem in STEMS:
        mine = [test for test in tests if gpu_steps.about(test, stem)]
        assert [test for test in mine if "test_as_good_as_torch" in test], done.stdout
    assert all(re.search(r"[\[-]cuda[\]-]", test) for test in tests)


def test_a_test_is_about_an_operator():
    assert gpu_steps.about("tests/test_ops.py::test_law[cuda-bfloat16-titans-plain]", "titans")
    assert gpu_steps.about("tests/test_ops.py::test_law[titans-plain-cuda]", "titans")
    assert not gpu_steps.about("tests/test_ops.py::test_law[cuda-float16-titans-plain]", "conv")
    assert gpu_steps.about("tests/test_conv.py::test_cuda_tails[float16]", "conv")
    assert gpu_steps.about("tests/test_cms_cuda.py::test_groups[cuda]", "cms")
    assert not gpu_steps.about("tests/test_convolutions.py::test_tails[cuda]", "conv")


def test_the_laws_are_shared_out_among_processes(steps, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    hook = "items[:] = items[int(os.environ['HOPE_TESTS_PART'][0])::2]"
    (tmp_path / "conftest.py").write_text(
        f"import os\ndef pytest_collection_modifyitems(items):\n    {hook}\n"
    )
    path = tmp_path / "test_ops.py"
    path.write_text(TESTS.format(body="pass"))
    assert steps.pytest([str(path)], 120).detail == "3 passed, 0 failed, 0 skipped"
    path.write_text(TESTS.format(body="assert case != 'titans-carried'"))
    outcome = steps.pytest([str(path)], 120)
    assert (outcome.status, outcome.detail.split(";")[0]) == (RED, "2 passed, 1 failed, 0 skipped")
    assert "AssertionError" in outcome.facts["output_tail"]


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [((0, 0), 0), ((0, 5), 0), ((5, 5), 5), ((0, 1, 5), 1), ((1, None), None), ((0, -9), -9)],
)
def test_the_worst_status_of_several_processes_counts(statuses, expected):
    done = gpu_steps.together([Done(status, f"of {status}") for status in statuses])
    assert done.status == expected
    if expected not in (0, 5):
        assert done.output.endswith(f"of {expected}")


# ---- compute-sanitizer ---------------------------------------------------------------------------


@pytest.fixture
def toolkit(steps, tmp_path, monkeypatch):
    """An nvcc that makes a program, and a sanitizer that finds what the environment says: FINDS
    names the tools that find something in the cases, MISSES says that it misses the probe's."""
    script(tmp_path / "bin/nvcc", 'while [ "$1" != -o ]; do shift; done; echo true >"$2"')
    tool = script(
        tmp_path / "bin/compute-sanitizer",
        """
        [ -z "$BROKEN" ] || { echo "Device not supported"; exit 1; }
        case "$*" in
            *probe\\ wrong) [ -n "$MISSES" ] && exit 0 || exit 86 ;;
            *probe\\ right) exit 0 ;;
        esac
        [ -z "$CRASHES" ] || exit 7
        case "$FINDS" in *$2*) echo "a hazard"; exit 86 ;; esac
        printf 'conv-tiny ran\nconv-tail ran\n'
        """,
    )
    monkeypatch.setattr(sources, "find_tool", lambda name: tool)
    monkeypatch.setattr(build_config, "find_cuda", lambda wanted: (tmp_path, "13.0"))

    def sanitize(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return steps.sanitizer(60)

    return sanitize


def test_sanitizer_green(toolkit):
    outcome = toolkit()
    counts = [f"{tool} green 2 cases" for tool in gpu_steps.SANITIZER_TOOLS]
    assert outcome == Outcome(GREEN, "; ".join(counts))


def test_what_a_sanitizer_finds_is_red(toolkit):
    outcome = toolkit(FINDS="racecheck")
    assert (outcome.status, outcome.detail) == (RED, "memcheck green 2 cases; racecheck red")
    assert "a hazard" in outcome.facts["output_tail"]


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"BROKEN": "1"}, "the right probe ended with 1, not 0: Device not supported"),
        ({"MISSES": "1"}, "the wrong probe ended with 0, not 86: no output"),
    ],
)
def test_a_sanitizer_that_fails_its_probe_is_unavailable(toolkit, variables, reason):
    assert toolkit(**variables) == Outcome(UNAVAILABLE, reason)


def test_a_sanitizer_that_crashes_is_not_green(toolkit):
    outcome = toolkit(CRASHES="1")
    assert outcome.status == UNAVAILABLE
    assert outcome.detail.startswith("memcheck unavailable exit status 7; racecheck unavailable")


def test_a_sanitizer_without_time_is_cut_short(steps, toolkit, monkeypatch):
    monkeypatch.setattr(steps, "probe", lambda tool: None)
    outcome = steps.sanitizer(gpu_steps.LEAST_SECONDS - 1)
    assert (outcome.status, "memcheck cut short no time left" in outcome.detail) == (CUT, True)


def test_no_sanitizer(toolkit, monkeypatch):
    monkeypatch.setattr(sources, "find_tool", lambda name: None)
    assert toolkit() == Outcome(UNAVAILABLE, "no compute-sanitizer on PATH or in the toolkit")


def test_tools_are_looked_for_in_the_toolkit(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sources.find_tool("a-tool-of-ours") is None
    tool = script(tmp_path / "bin/a-tool-of-ours", "true")
    assert sources.find_tool("a-tool-of-ours") == tool


def test_the_probe_compiles(tmp_path, root):
    try:
        home, _ = build_config.find_cuda(torch.version.cuda or "")
    except (build_config.BuildError, IndexError) as missing:
        pytest.skip(str(missing))
    command = [home / "bin/nvcc", "-c", "-arch=sm_90", "-o", tmp_path / "probe.o"]
    done = subprocess.run(
        [*command, root / "benchmarks/sanitizer_probe.cu"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---- benchmarks ----------------------------------------------------------------------------------

TIMED = {
    "rows": [{"contest": "operator", "row": "ours", "median_ms": 1.0}],
    "left_out": [],
}


@pytest.fixture
def bench(steps, tmp_path, monkeypatch):
    """Lets the benchmark of titans end so, and write this; returns the step's outcome and the
    command."""
    monkeypatch.setattr(steps, "kernels", ["titans"])

    def bench(status=0, result=None, seconds=200):
        commands = []

        def run(words, limit):
            commands.append(" ".join(words))
            if result is not None:
                (tmp_path / "2026-01-01-titans-cuda.json").write_text(json.dumps(result))
            return Done(status, "")

        monkeypatch.setattr(steps, "run", run)
        return steps.benchmarks(seconds), commands

    return bench


def test_a_benchmark_is_timed(bench, tmp_path):
    outcome, (words,) = bench(result=TIMED)
    expected = Outcome(GREEN, "titans: 2026-01-01-titans-cuda.json", {"timed": ["titans"]})
    assert outcome == expected
    assert f"--op titans --device cuda --out {tmp_path} --seconds 1" in words


def test_a_benchmark_says_what_was_left_out(bench):
    outcome, _ = bench(result={**TIMED, "left_out": ["layer"]})
    assert (outcome.status, outcome.facts["timed"]) == (CUT, ["titans"])
    assert outcome.detail == "titans: 2026-01-01-titans-cuda.json, 1 contests left out"


@pytest.mark.parametrize(
    ("options", "status", "timed"),
    [
        ({"status": 1}, RED, []),  # the operator is wrong
        ({"result": {"rows": [], "left_out": []}}, RED, []),
        ({"status": None}, CUT, []),
        ({"status": None, "result": TIMED}, CUT, ["titans"]),  # it wrote what it had
        ({"seconds": 10}, CUT, []),
    ],
)
def test_a_benchmark_that_does_not_end_well(bench, options, status, timed):
    outcome, commands = bench(**options)
    assert (outcome.status, outcome.facts["timed"]) == (status, timed)
    assert len(commands) == (0 if "seconds" in options else 1)


def test_operators_without_kernels_or_benchmark_are_not_timed(bench, steps):
    steps.kernels = []
    assert bench()[0].status == SKIPPED
    steps.kernels = ["no-such-stem"]
    assert bench()[0].status == SKIPPED


def test_a_wrong_operator_stops_the_benchmarks(bench, steps):
    steps.kernels = ["conv", "titans"]
    outcome, commands = bench(status=1)
    assert (outcome.status, len(commands)) == (RED, 1)


# ---- on the GPU ----------------------------------------------------------------------------------


def test_selftests_are_red_if_one_is(monkeypatch, capsys):
    results = [("movmatrix", ""), ("mma bf16", "")]
    monkeypatch.setattr(_load, "extension", SimpleNamespace(run_selftests=lambda: results))
    assert on_gpu.main(["selftests"]) == 0
    results[1] = ("mma bf16", "element 0: expected 1, got 2")
    assert on_gpu.main(["selftests"]) == 1
    assert "mma bf16: element 0: expected 1, got 2" in capsys.readouterr().out
    results.clear()
    assert on_gpu.main(["selftests"]) == 1


@pytest.mark.parametrize("stem", STEMS)
def test_the_smallest_cases_run_and_have_work(stem):
    cases = on_gpu.smallest_cases(stem)
    assert len(cases) == on_gpu.SMALLEST_CASES
    for case in cases:
        assert case.runs_on("cuda")
        assert on_gpu._size(case) > 0
        for dtype in on_gpu.DTYPES:
            on_gpu.run_case(case, dtype, "cpu")
