"""SIGKILL at any moment of `hope train`: the resumed run is bitwise the one that was not killed."""

import importlib
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
import runs
import torch
from hope import load_model
from hope.checkpoint import find_checkpoint, has_checkpoint
from hope.cli import main

# Processes of their own that need not import torch again.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["hope.cli", "hope.training_state", "test_hope_kill"])
STEPS = 20
LONGER = [*runs.OPTIONS, "--steps", str(STEPS)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(runs.TEXT)
    return str(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    """A run that nothing has stopped."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", "--data", text, "--out", str(out), *LONGER]) == 0
    torch.set_num_threads(threads)
    return out


def command(text, out):
    """The command that begins the run in `out`, or goes on with it."""
    if has_checkpoint(out):
        return ["train", "--resume", "--out", str(out)]
    shutil.rmtree(out, ignore_errors=True)  # killed before its first checkpoint
    return ["train", "--data", text, "--out", str(out), *LONGER]


def assert_same_run(out, whole):
    assert runs.without_times(runs.records(out)) == runs.without_times(runs.records(whole))
    expected = load_model(whole).state_dict()
    for name, weight in load_model(out).state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert (out / "sample.txt").read_text() == (whole / "sample.txt").read_text()


def train(arguments, output):
    """`hope train` in a process of its own; what it prints goes to a file."""
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os._exit(main(arguments))


def train_to(moment, arguments, output):
    """The same; it kills itself at a moment of its second checkpoint."""
    name, number, before = MOMENTS[moment]
    module, _, function = name.rpartition(".")
    module = importlib.import_module(module)
    original, calls = getattr(module, function), itertools.count(1)

    def deadly(*arguments, **options):
        here = next(calls) == number
        if here and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if here:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, function, deadly)
    train(arguments, output)


# A function that writing a checkpoint calls, which of its calls, and whether death comes before.
# Each checkpoint renames twice: the state's metadata, and then the whole directory.
MOMENTS = {
    "before the weights": ("hope.checkpoint.save_file", 2, True),
    "after the weights": ("hope.checkpoint.save_file", 2, False),
    "before the end of the state": ("os.rename", 3, True),
    "before the new name": ("os.rename", 4, True),
    "after the new name": ("os.rename", 4, False),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_while_a_checkpoint_is_written(tmp_path, text, whole, moment):
    out = tmp_path / "run"
    process = PROCESSES.Process(
        target=train_to, args=(moment, command(text, out), tmp_path / "output")
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "output").read_text()
    newest = "step-00000004" if moment == "after the new name" else "step-00000002"
    assert find_checkpoint(out).name == newest
    assert main(command(text, out)) == 0
    assert_same_run(out, whole)


def count_lines(out):
    metrics = out / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


@pytest.mark.parametrize("seed", [0, 1])
def test_kills_at_any_moment(tmp_path, text, whole, seed):
    out, moments, kills = tmp_path / "run", random.Random(seed), 0
    while kills < 4:
        process = PROCESSES.Process(target=train, args=(command(text, out), tmp_path / "output"))
        lines = count_lines(out)
        process.start()
        while count_lines(out) == lines and process.is_alive():
            time.sleep(0.001)
        process.join(moments.uniform(0, 0.3))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it has come to its end
            break
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "output").read_text()
        kills += 1
    assert kills
    assert main(command(text, out)) == 0
    assert_same_run(out, whole)
