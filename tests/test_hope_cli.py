"""The command line, as a user calls it."""

import json
import re
import signal
import subprocess
import sys

import pytest
import torch
from bad_input import commands
from hope import AttentionConfig, generate, load_model, preset
from hope.cli import main

SMALL = [
    *("--set", "model.dim=16", "--set", "model.layers=1", "--set", "model.mixer.head_dim=8"),
    *(
        "--set",
        "train.batch=2",
        "--set",
        "train.sequence=32",
        "--set",
        "train.validation_tokens=64",
    ),
]


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A text file, in the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    return "text.txt"


TRAIN = ("train", "--data", "text.txt")


@pytest.fixture
def train(text):
    def run(*arguments):
        return main([*TRAIN, "--steps", "3", *SMALL, *arguments])

    return run


def refused(capsys, arguments):
    """The one line that a wrong call prints."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("hope: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_train_says_what_it_does_and_where_the_files_are(train, tmp_path, capsys):
    assert train() == 0
    out, bar = capsys.readouterr()
    assert re.search(r"100%.* 192/192 \[.*, loss=\d\.\d+, validation=\d\.\d+\]", bar)
    assert re.search(r"model  hope-tiny: \d\.\d\d M parameters, on cpu", out)
    assert "text.txt (1 file): " in out
    assert "budget 3 steps of 64 bytes (192 in all)" in out
    assert re.search(r"validation: \d+\.\d{4} bits per byte after 192 bytes", out)
    assert "a sample:" in out
    for path in ("metrics.jsonl", "loss.png", "sample.txt", "checkpoints/step-00000003"):
        assert f"runs/hope-tiny/{path}" in out
        assert (tmp_path / "runs" / "hope-tiny" / path).exists()


@pytest.mark.parametrize(
    "name",
    [
        *("tiny-deep", "tiny-mac", "tiny-mag", "tiny-mal", "tiny-transformer", "tiny-gelu"),
        *("hope-tiny", "hope-tiny-cms", "hope-attention-tiny"),
    ],
)
def test_every_variant_learns_and_writes(text, tmp_path, capsys, name):
    sizes = ("--set", "model.mixer.heads=2")
    if not isinstance(preset(name).model.mixer, AttentionConfig):
        sizes += ("--set", "model.mixer.chunk_size=8")
    if preset(name).model.cms is not None:
        sizes += ("--set", "model.cms.chunk_sizes=[4, 8, 16, 32]")
    near = {"tiny-mac": "segment", "tiny-mag": "window", "tiny-mal": "window"}.get(name)
    if near is not None:
        sizes += ("--set", f"model.mixer.{near}=12")
    rate = ("--set", "train.lr=2e-2", "--set", "train.batch=8")
    assert main([*TRAIN, "--preset", name, "--steps", "40", *SMALL, *sizes, *rate]) == 0
    lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    losses = [r["train_bits_per_byte"] for r in records if "train_bits_per_byte" in r]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    capsys.readouterr()
    assert main(["generate", f"runs/{name}", "--prompt", "the q", "--length", "20"]) == 0
    assert capsys.readouterr().out.startswith("the q")
    # With the carried state it writes what the full forward finds likeliest.
    model = load_model(f"runs/{name}")
    written = list(generate(model, "the q", length=40, temperature=0))
    tokens = torch.tensor([[256, *b"the q", *written]])
    likeliest = model(tokens)[0, 5:-1, :257].argmax(-1)
    assert likeliest.tolist() == written


def test_every_new_run_gets_a_directory_and_resume_finds_the_latest(train, tmp_path, capsys):
    for _ in range(3):
        assert train() == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "hope-tiny",
        "hope-tiny-2",
        "hope-tiny-3",
    }
    capsys.readouterr()
    assert main(["train", "--resume"]) == 0
    assert "out    runs/hope-tiny-3, continued after step 3" in capsys.readouterr().out


def test_a_named_directory_is_not_written_over(train, capsys):
    assert train("--out", "mine") == 0
    capsys.readouterr()
    assert train("--out", "mine") == 2
    assert "mine is not empty; continue that run with --resume" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_settings(train, capsys):
    assert train("--out", "mine") == 0
    capsys.readouterr()
    resume = ["train", "--resume", "--out", "mine"]
    assert "these differ: train.lr (" in refused(capsys, [*resume, "--set", "train.lr=0.5"])
    assert "these differ: train.tokens (192 in the run" in refused(
        capsys, [*resume, "--steps", "9"]
    )
    assert "a run of preset 'hope-tiny', not '125m'" in refused(
        capsys, [*resume, "--preset", "125m"]
    )
    assert train("--out", "mine", "--resume") == 0  # the same settings once more


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "absent.txt"], "no such file or directory: absent.txt"),
        (["train", "--data", "empty.txt"], "empty.txt is empty"),
        (["train", "--data", "binary"], "binary is not UTF-8 text"),
        (["train", "--data", "short.txt"], "too little text"),
        (["train", "--set", "model.dims=3"], "there is no setting 'model.dims'"),
        (["train", "--set", "train.lr=fast"], "train.lr must be of type float, not 'fast'"),
        (["train", "--resume"], "no such run or checkpoint: runs/hope-tiny"),
        (["generate", "runs/absent"], "no such run or checkpoint: runs/absent"),
        (["generate", "."], "there is no checkpoint in ."),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(text, tmp_path, capsys, arguments, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary").write_bytes(b"\0\1\2" * 999)
    (tmp_path / "short.txt").write_text("short")
    assert message in refused(capsys, arguments)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--steps", "0"], "must be a whole number above 0, not '0'"),
        (["train", "--tokens", "1.5"], "must be a whole number above 0, not '1.5'"),
        (["train", "--tokens", "many"], "must be a whole number above 0, not 'many'"),
        (["train", "--preset", "huge"], "invalid choice: 'huge'"),
        (["train", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["train", "--steps", "1", "--tokens", "1"], "not allowed with argument"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_a_wrong_option_is_explained(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_generate_continues_a_prompt(train, capsys):
    assert train() == 0
    capsys.readouterr()
    call = ["generate", "runs/hope-tiny", "--prompt", "the q", "--length", "20", "--seed", "3"]
    assert main(call) == 0
    first = capsys.readouterr().out
    assert first.startswith("the q")
    assert len(first) > len("the q\n")
    assert main(call) == 0
    assert capsys.readouterr().out == first
    assert "temperature must be at least 0" in refused(capsys, [*call, "--temperature", "-1"])


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("build", "version", "torch", "cpu", "threads", "CUDA kernels"):
        assert word in out


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m hope info | true; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in run.stderr
    assert run.returncode in (0, 128 + signal.SIGPIPE)  # 0: all fitted into the pipe in time


# Every command, and what only has commands below it: "evaluate", and "hope" itself.
HELPFUL = {" ".join(words.split()[:n]) for words in commands() for n in range(4)}


@pytest.mark.parametrize("command", sorted(HELPFUL))
def test_help(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")  # what argparse breaks, it breaks for the terminal
    with pytest.raises(SystemExit) as exit_:
        main([*command.split(), "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: hope {command}".rstrip())
    assert max(map(len, out.splitlines())) <= 100


def test_ctrl_c_keeps_a_usable_checkpoint(train, text, tmp_path):
    arguments = ["train", "--data", text, "--steps", "1000000", *SMALL, "--out", "run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hope", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while "out    run" not in process.stdout.readline():
            assert process.poll() is None
        while not (tmp_path / "run" / "metrics.jsonl").exists():  # its handlers come with this file
            assert process.poll() is None
        while not (tmp_path / "run" / "metrics.jsonl").read_text():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT == 130
    assert "stopping after this step, with a checkpoint" in err
    assert "Traceback" not in err
    assert "continue with: hope train --resume --out run" in out
    assert main(["generate", "run", "--length", "3"]) == 0


def test_what_cannot_share_its_work_refuses_many_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["info"]) == 2
    assert "only `hope train` runs on many processes" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(["info"]) == 0
