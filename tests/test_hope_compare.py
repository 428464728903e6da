"""`hope compare`: presets side by side, stopped and resumed, and what it refuses."""

import json
import signal

import pytest
from hope import HopeError, preset
from hope.cli import main
from hope.compare import comparable, table
from hope.train import Trainer

SMALL = [
    *("--set", "model.dim=16", "--set", "model.layers=1", "--set", "model.mixer.head_dim=4"),
    *("--set", "train.batch=2", "--set", "train.sequence=32", "--set", "train.validate_every=2"),
    *("--set", "train.validation_tokens=64"),
]
NAMES = ["tiny", "tiny-transformer", "tiny-mac"]


@pytest.fixture(autouse=True)
def text(tmp_path, monkeypatch):
    """A text file in the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 50)


def compare(*arguments, steps="4"):
    return main(["compare", *arguments, "--data", "text.txt", "--steps", steps, *SMALL])


def refused(capsys, arguments):
    """The one line that a wrong call prints."""
    capsys.readouterr()
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hope: error: ")
    assert error.count("\n") == 1
    return error


def without_times(run):
    """A run's figures without its seconds, and those of its curves."""
    curves = ("training", "validation")
    kept = {name: value for name, value in run.items() if "second" not in name}
    return kept | {c: {k: v for k, v in run[c].items() if k != "seconds"} for c in curves}


def test_compare_trains_presets_side_by_side(tmp_path, capsys):
    assert compare(*NAMES) == 0
    out = tmp_path / "runs" / "compare"
    result = json.loads((out / "compare.json").read_text())
    assert [run["preset"] for run in result["runs"]] == NAMES
    for run in result["runs"]:
        assert (run["tokens"], run["training"]["tokens"]) == (256, [64, 128, 192, 256])
        assert run["validation"]["tokens"] == [128, 256]
        assert run["validation"]["bits_per_byte"][-1] == run["validation_bits_per_byte"] > 0
        assert run["parameters"] > 0
        assert (out / run["preset"] / "checkpoints" / "step-00000004").is_dir()
        assert (out / run["preset"] / "sample.txt").is_file()
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert table(result["runs"]) == "\n".join(result["table"]) in shown
    assert "runs/compare/compare.json" in shown
    assert main(["generate", "runs/compare/tiny-mac", "--length", "3"]) == 0
    assert compare(*NAMES[:2]) == 0  # the next one gets a directory of its own
    assert (tmp_path / "runs" / "compare-2" / "compare.json").is_file()


def test_a_stopped_comparison_resumes_where_it_was(tmp_path, capsys, monkeypatch):
    assert compare(*NAMES, "--out", "whole") == 0
    step = Trainer._train_step

    def stopped(trainer):
        if trainer.config.preset == "tiny-transformer" and trainer.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(trainer)

    monkeypatch.setattr(Trainer, "_train_step", stopped)
    capsys.readouterr()
    assert compare(*NAMES, "--out", "cut") == 128 + signal.SIGTERM
    shown = capsys.readouterr().out
    assert "stopped by SIGTERM; continue with: hope compare --resume --out cut" in shown
    partial = json.loads((tmp_path / "cut" / "compare.json").read_text())
    assert [run["preset"] for run in partial["runs"]] == ["tiny"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    # A run that was killed before its first checkpoint leaves this, and begins anew.
    (tmp_path / "cut" / "tiny-mac").mkdir()
    (tmp_path / "cut" / "tiny-mac" / "metrics.jsonl").write_text('{"step": 1, "tok')
    assert main(["compare", "--resume", "--out", "cut"]) == 0
    cut, whole = (
        json.loads((tmp_path / name / "compare.json").read_text()) for name in ("cut", "whole")
    )
    assert [*map(without_times, cut["runs"])] == [*map(without_times, whole["runs"])]
    assert compare(*NAMES, "--resume", "--out", "cut") == 0  # finished, and the same settings


def test_a_resumed_comparison_keeps_its_presets_and_settings(tmp_path, capsys):
    assert compare(*NAMES[:2], "--out", "mine") == 0
    resume = ["--resume", "--out", "mine"]
    assert "mine is a comparison of tiny tiny-transformer, not of tiny tiny-mac" in refused(
        capsys, ["tiny", "tiny-mac", *resume]
    )
    assert "these differ: train.lr (" in refused(capsys, [*resume, "--set", "train.lr=0.5"])
    assert "these differ: train.tokens (256 in the run" in refused(capsys, [*resume, "--steps=9"])
    assert "mine is not empty; continue that comparison with --resume" in refused(
        capsys, [*NAMES, "--data", "text.txt", "--out", "mine"]
    )
    (tmp_path / "mine" / "compare.json").write_text("{")
    assert "cannot read mine/compare.json" in refused(capsys, resume)
    (tmp_path / "mine" / "compare.json").write_text("{}")
    assert "cannot read mine/compare.json" in refused(capsys, resume)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a comparison needs two presets or more, not none"),
        (["tiny"], "a comparison needs two presets or more, not tiny"),
        (["tiny", "huge"], "unknown preset 'huge'; there are: tiny, "),
        (["tiny", "tiny-mac", "tiny"], "preset 'tiny' is named twice"),
        (["tiny", "125m"], "125m and tiny cannot be compared: train.batch is 64 and 16"),
        (["tiny", "tiny-mac", "--set", "model.dims=3"], "there is no setting 'model.dims'"),
        (["tiny", "tiny-mac", "--data", "absent.txt"], "no such file or directory: absent.txt"),
        (["--resume"], "there is no comparison in runs/compare"),
        (["--resume", "--out", "absent"], "there is no comparison in absent"),
    ],
)
def test_a_comparison_that_cannot_be(tmp_path, capsys, arguments, message):
    assert message in refused(capsys, arguments)
    assert not (tmp_path / "runs").exists()


def test_the_budget_is_the_first_presets_or_the_one_asked_for():
    configs = [preset(name) for name in NAMES]
    assert {c.train.tokens for c in comparable(configs)} == {configs[0].train.tokens}
    assert {c.train.tokens for c in comparable(configs, 5_000)} == {5_000}
    with pytest.raises(HopeError, match="needs two presets"):
        comparable(configs[:1])
