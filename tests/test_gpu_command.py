"""`make gpu` and `python -m benchmarks.status`, without a GPU: order, limits, what is claimed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import build_config
from benchmarks import gpu, gpu_steps, sources, status
from benchmarks.gpu_steps import CUT, GREEN, RED, SKIPPED, UNAVAILABLE, Outcome, Step

H100 = {"name": "NVIDIA H100 80GB HBM3", "capability": [9, 0]}


@pytest.fixture(autouse=True)
def log(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu_steps, "LOG", tmp_path / "gpu.txt")
    monkeypatch.setenv("HOPE_COMMIT", "")  # restored afterwards, whatever the command sets


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_gpu(root, tmp_path):
    """It uses the environment if there is one, else the Python that it is given, and no pip."""

    def make(*words, **environment):
        environment = {k: v for k, v in os.environ.items() if "MAKE" not in k} | environment
        command = ["make", "--no-print-directory", "-C", str(root), "gpu"]
        command += [f"PYTHON={sys.executable}", *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert make("-n", f"VENV={tmp_path / 'venv'}", "ARGS=--flag").stdout == (
        f"{python} -m benchmarks.gpu --flag\n"
    )
    done = make(f"VENV={tmp_path / 'none'}", CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0
    assert "it needs a GPU, so nothing was built or run" in done.stderr


def test_without_a_gpu_nothing_is_done(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_steps, "Steps", lambda *_: pytest.fail("it went on"))
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "nothing was built or run" in said
    assert not (tmp_path / "out").exists()


def test_why_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.find_gpu() == "torch sees no GPU here"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu.find_gpu() == f"torch {torch.__version__} is a build without CUDA"
    monkeypatch.setitem(sys.modules, "torch", None)
    assert gpu.find_gpu().startswith(f"torch is not installed for {sys.executable}")


def test_the_gpu_is_described(monkeypatch):
    found = SimpleNamespace(name=H100["name"], major=9, minor=0, total_memory=1 << 36)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    facts = {"memory": 1 << 36, "torch": torch.__version__, "cuda": "13.0"}
    assert gpu.find_gpu() == {**H100, **facts}


@pytest.mark.parametrize(
    ("capability", "code"),
    [
        ((9, 0), "9.0a"),
        ((8, 0), "8.0"),
        ((8, 6), "8.6"),
        ((10, 0), "10.0a"),
        ((12, 1), "12.0"),  # the letter's code would not run on another minor
        ((11, 0), "8.0+PTX"),
    ],
)
def test_it_compiles_for_the_gpu(capability, code, monkeypatch):
    assert gpu.architecture(capability) == code
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", code)
    assert build_config.requested_architectures() == (code,)


# ---- steps ---------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def run_fake(seconds: float, *steps: tuple) -> list[tuple[str, str, float | None]]:
    """Runs steps (name, limit, seconds it takes, status, gate); the third of each result is the
    time that the step was given."""
    clock, found, given = Clock(), [], {}

    def step(name, limit, takes, outcome, gate=False):
        def run(allowed):
            given[name] = allowed
            clock.now += takes
            return Outcome(outcome)

        return Step(name, limit, run, gate)

    gpu.run_steps(
        [step(*s) for s in steps],
        seconds,
        lambda s, outcome, _: found.append((s.name, outcome.status, given.get(s.name))),
        clock,
    )
    return found


def test_steps_run_in_order_and_within_their_limits():
    assert run_fake(100, ("a", 60, 50, GREEN), ("b", 60, 20, GREEN), ("c", 10, 5, GREEN)) == [
        ("a", GREEN, 60),
        ("b", GREEN, 50),  # what is left of 100
        ("c", GREEN, 10),
    ]


def test_red_stops_everything_after_it():
    found = run_fake(100, ("a", 9, 1, GREEN), ("laws", 9, 1, RED), ("b", 9, 1, GREEN, True))
    assert found == [("a", GREEN, 9), ("laws", RED, 9), ("b", SKIPPED, None)]


@pytest.mark.parametrize("status", [CUT, UNAVAILABLE, SKIPPED])
def test_only_a_gate_has_to_be_green(status):
    assert run_fake(100, ("a", 9, 1, status), ("b", 9, 1, GREEN))[1][1] == GREEN
    assert run_fake(100, ("a", 9, 1, status, True), ("b", 9, 1, GREEN))[1][1] == SKIPPED


def test_a_step_without_time_is_skipped():
    found = run_fake(100, ("a", 99, 90, GREEN), ("b", 9, 1, GREEN), ("c", 9, 1, GREEN))
    assert found == [("a", GREEN, 99), ("b", SKIPPED, None), ("c", SKIPPED, None)]


def test_the_plan(tmp_path):
    steps = gpu_steps.Steps(["conv", "titans"], "9.0a", tmp_path).plan()
    names = ["build", "environment", "self-tests", "laws", "operators' tests", "sanitizer"]
    assert [step.name for step in steps] == [*names, "benchmarks"]
    assert [step.name for step in steps if step.gate] == names[:3]
    assert set(gpu.NEEDED) <= set(names)
    # Limits alone never keep the laws from being tried; 10 s may pass until a command is killed.
    assert sum(step.seconds for step in steps[:3]) + gpu_steps.LEAST_SECONDS <= gpu.SECONDS
    assert gpu.SECONDS + 10 < 8 * 60


# ---- the result ----------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A tree with two operators' sources."""
    for name in ("csrc/common/host.h", "csrc/conv/conv.h", "csrc/titans/titans.h"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "hope_ext").mkdir()
    for stem in ("conv", "titans"):
        (tmp_path / f"hope_ext/{stem}.py").write_text(stem)
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    return tmp_path


def fake_steps(**changed: Outcome) -> list[Step]:
    """A run on a build where only conv has CUDA kernels."""
    outcomes = {
        "build": Outcome(GREEN),
        "environment": Outcome(GREEN, "", {"cuda_stems": ["conv"]}),
        "self-tests": Outcome(GREEN),
        "laws": Outcome(GREEN, "", {"passed_by_stem": {"conv": 7, "titans": 0}}),
        "sanitizer": Outcome(UNAVAILABLE),
        "benchmarks": Outcome(GREEN, "", {"timed": ["conv"]}),
    } | changed
    return [Step(name, 60, lambda _, outcome=o: outcome) for name, o in outcomes.items()]


def run_gpu(out: Path, monkeypatch, steps: list[Step]) -> tuple[int, dict]:
    monkeypatch.setattr(gpu, "find_gpu", lambda: H100)
    monkeypatch.setattr(gpu_steps.Steps, "plan", lambda _: steps)
    code = gpu.main(["--out", str(out), "--commit", "abc"])
    (path,) = out.glob("*-gpu-nvidia-h100-80gb-hbm3.json")
    return code, json.loads(path.read_text())


def claims(result: dict) -> dict[str, tuple[bool, bool]]:
    return {stem: (x["verified"], x["timed"]) for stem, x in result["stems"].items()}


def test_a_result_says_what_was_verified(checkout, monkeypatch, capsys):
    code, result = run_gpu(checkout / "out", monkeypatch, fake_steps())
    assert code == 0
    assert result["finished"]
    assert result["gpu"] == H100
    assert result["architectures"] == os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert result["commit"] == "abc"  # the tree is no git checkout
    assert claims(result) == {"conv": (True, True), "titans": (False, False)}
    assert result["stems"]["conv"]["sources_sha256"] == sources.sources_hash("conv")
    assert [step["step"] for step in result["steps"]][:3] == ["build", "environment", "self-tests"]
    shown = capsys.readouterr().out
    assert "conv: verified, timed" in shown
    assert "titans: NOT verified, NOT timed (no CUDA kernels in this build)" in shown


@pytest.mark.parametrize("laws_status", [RED, CUT, SKIPPED])
def test_nothing_is_verified_unless_all_laws_are_green(checkout, monkeypatch, laws_status):
    outcome = Outcome(laws_status, "", {"passed_by_stem": {"conv": 7}})
    code, result = run_gpu(checkout / "out", monkeypatch, fake_steps(laws=outcome))
    assert code == 1
    assert claims(result)["conv"] == (False, laws_status != RED)


@pytest.mark.parametrize("red", ["sanitizer", "benchmarks"])
def test_a_later_red_step_takes_the_claim_back(checkout, monkeypatch, red):
    code, result = run_gpu(checkout / "out", monkeypatch, fake_steps(**{red: Outcome(RED)}))
    assert code == 1
    assert claims(result)["conv"] == (False, False)


def test_sources_that_change_during_the_run_are_not_verified(checkout, monkeypatch):
    def edit(seconds):
        (checkout / "csrc/conv/conv.h").write_text("edited")
        return Outcome(GREEN)

    steps = [*fake_steps(), Step("edit", 60, edit)]
    assert claims(run_gpu(checkout / "out", monkeypatch, steps)[1])["conv"] == (False, False)


def test_the_result_is_on_disk_after_every_step(checkout, monkeypatch):
    def die(seconds):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_gpu(checkout / "out", monkeypatch, [*fake_steps(), Step("dies", 60, die)])
    result = json.loads(next((checkout / "out").glob("*.json")).read_text())
    assert not result["finished"]
    assert [step["status"] for step in result["steps"]][:4] == [GREEN] * 4
    assert claims(result)["conv"] == (False, False)


# ---- status --------------------------------------------------------------------------------------


def test_status_without_results(checkout, capsys):
    assert status.main(["--results", str(checkout)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{stem}: {what}: never" for stem in ("conv", "titans") for what in ("verified", "timed")
    ]


def test_status_compares_with_the_sources(checkout, capsys, monkeypatch):
    out = checkout / "out"
    run_gpu(out, monkeypatch, fake_steps())
    capsys.readouterr()
    status.main(["--results", str(out)])
    conv, timed, titans, _ = capsys.readouterr().out.splitlines()
    assert f"on {H100['name']}, unchanged since (" in conv
    assert "unchanged" in timed
    assert titans == "titans: verified: never"
    (checkout / "csrc/common/host.h").write_text("changed")
    status.main(["--results", str(out)])
    assert "CHANGED since" in capsys.readouterr().out.splitlines()[0]


def test_status_shows_the_last_time_and_counts_benchmarks_alone(checkout, capsys):
    for day, digest in (("2026-01-02", sources.sources_hash("conv")), ("2026-01-01", "old")):
        result = {
            **{"benchmark": "ops", "op": "conv", "device": "cuda", "date": f"{day}T00:00:00"},
            "environment": {"sources_sha256": digest, "gpu": {"name": "a GPU"}},
            "rows": [{"contest": "operator", "row": "ours", "median_ms": 1.0}],
        }
        (checkout / f"{day}.json").write_text(json.dumps(result))
    (checkout / "cpu.json").write_text(json.dumps({"benchmark": "ops", "device": "cpu"}))
    result["op"], result["rows"][0]["contest"] = "titans", "layer"
    (checkout / "layer.json").write_text(json.dumps(result))
    status.main(["--results", str(checkout)])
    assert capsys.readouterr().out.splitlines() == [
        "conv: verified: never",
        "conv: timed: 2026-01-02 on a GPU, unchanged since (2026-01-02.json)",
        "titans: verified: never",
        "titans: timed: never",
    ]
