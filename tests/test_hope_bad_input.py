"""Every command with wrong input: a line that names it, exit code 2 or 1, and nothing written."""

from __future__ import annotations

import collections
import contextlib
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bad_input import CALLS, commands, make_place, rows
from hope.cli import main

FAULTS = collections.defaultdict(list)
for row in rows():
    FAULTS[row.command].append(row)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Texts, a run, and runs that are damaged."""
    path = tmp_path_factory.mktemp("place")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        make_place(path)
    torch.set_num_threads(threads)
    return path


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return place


def called(arguments, capsys):
    """The exit code of a call in this process, and its stderr."""
    try:
        status = main(shlex.split(arguments))
    except SystemExit as exit_:  # argparse's own
        status = exit_.code
    return status, capsys.readouterr().err


def files(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*")}


def test_every_command_has_a_right_call_and_wrong_ones():
    assert set(commands()) == set(CALLS)
    assert set(commands()) - {"bench"} <= set(FAULTS)  # it is another program's, with its errors


@pytest.mark.parametrize("command", FAULTS)
def test_a_mistake_is_a_line_that_names_it(command, here, capsys):
    before, wrong = files(here), []
    for row in FAULTS[command]:
        shown = (
            row.arguments
            if len(row.arguments) < 200
            else row.arguments[:99] + " ... " + row.arguments[-99:]
        )
        status, err = called(row.arguments, capsys)
        said = [line for line in err.splitlines() if line.startswith("hope")]
        matches = len(said) == 1 and re.search(row.message, said[0])
        if status != row.status or not matches or "Traceback" in err:
            wrong.append(
                f"{shown}\n  ended with {status}, not {row.status}, and said {err[-300:]!r}"
            )
        if left := files(here) - before:
            wrong.append(f"{shown}\n  left {sorted(left)[:5]}")
            before |= left
    assert not wrong, "\n".join(wrong)


# ---- where nothing can be written ----------------------------------------------------------------


@contextlib.contextmanager
def full_disk():
    """Files of this process cannot grow beyond a few bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS = [command for command, call in CALLS.items() if call.endswith("new")]


@pytest.mark.parametrize("command", WRITERS)
def test_a_full_disk_is_a_failure_that_names_the_file(command, here, capsys, monkeypatch):
    if command == "evaluate harness":
        pytest.importorskip("lm_eval", reason="hope evaluate harness runs its tasks")
        from hope.evaluate import harness

        monkeypatch.setattr(harness, "run_tasks", lambda *_, **__: {"results": {"none": {}}})
        monkeypatch.setattr(harness, "table", str)
    before = files(here)
    with full_disk():
        status, err = called(CALLS[command], capsys)
    left = files(here) - before
    for path in sorted(left, reverse=True):
        (here / path).rmdir() if (here / path).is_dir() else (here / path).unlink()
    last = err.splitlines()[-1]
    assert (status, "Traceback" in err) == (1, False), err
    assert re.search(
        r"^hope: .*new.*(File too large|cannot be written whole)", last.rsplit("\r", 1)[-1]
    ), err
    assert not [name for name in left if "partial" in name]


@contextlib.contextmanager
def without_rights(place: Path):
    """As a user who may not write into `place`; root may everywhere, so it becomes another."""
    root, mode = os.geteuid() == 0, place.stat().st_mode
    place.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        place.chmod(mode)


@pytest.mark.parametrize("command", ["train", "compare", "tokenizer", "shards"])
def test_a_directory_that_may_not_be_written(command, here, capsys):
    with without_rights(here):
        status, err = called(CALLS[command], capsys)
    assert status == 1, err
    assert re.search(
        r"^hope: .*new.*: Permission denied$", err.splitlines()[-1].rsplit("\r", 1)[-1]
    )
    assert not (here / "new").exists()


def test_a_file_that_may_not_be_read(here, capsys):
    (here / "text.txt").chmod(0)
    with without_rights(here):
        status, err = called(CALLS["train"], capsys)
    (here / "text.txt").chmod(0o644)
    assert (status, err) == (2, "hope: error: cannot read text.txt: Permission denied\n")


def test_all_other_commands_write_on_stdout_alone(here, monkeypatch, capsys):
    assert set(CALLS) - set(WRITERS) == {"generate", "memory", "info", "bench"}
    for command in ("generate", "memory", "info"):
        with open("/dev/full", "w") as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            assert called(CALLS[command], capsys) == (1, "hope: No space left on device\n")


def test_memory_that_is_not_there_is_a_failure(here, capsys):
    call = CALLS["train"] + " --set model.vocab_size=1e14"
    status, err = called(call, capsys)
    assert status == 1
    assert err.startswith("hope: not enough memory: ")


# ---- as a process --------------------------------------------------------------------------------

HOPE = [sys.executable, "-m", "hope"]


def test_the_exit_code_of_the_command(here):
    run = subprocess.run([*HOPE, "generate", "absent"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "hope: error: no such run or checkpoint: absent\n"


def test_a_closed_pipe_ends_it_without_a_word(here):
    command = f"{shlex.join(HOPE)} generate run --length 100000 --temperature 1 | head -c 1"
    run = subprocess.run(["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True)
    assert run.stderr == b""
    assert run.returncode in (0, 128 + signal.SIGPIPE)  # 0: the model ended its text before


def test_ctrl_c_is_a_line(here, tmp_path):
    call = f"evaluate recall tiny --steps 1000000 --out {tmp_path / 'new'}"

    def listen() -> None:  # a shell's background job is deaf to it, and so is what it starts
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        [*HOPE, *call.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen,
    ) as run:
        while not run.stdout.readline().startswith("out "):  # then it trains
            assert run.poll() is None
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=300)
    assert (run.returncode, "Traceback" in err) == (130, False)
    assert err.splitlines()[-1] == "hope: interrupted"
