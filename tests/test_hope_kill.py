"""SIGKILL at any moment of `hope train` or `hope learn`: resumed, it is bitwise one without it."""

import itertools
import json
import multiprocessing
import os
import pkgutil
import random
import shutil
import signal
import time

import pytest
import runs
import torch
from hope import load_config, load_model
from hope.checkpoint import find_checkpoint, has_checkpoint
from hope.cli import main
from hope.continual import learn_config
from hope.continual.run import LearnRun, Lesson, learned_state
from torch.utils import _pytree as pytree

# Processes of their own that need not import torch again.
PROCESSES = multiprocessing.get_context("forkserver")
# What imports the last of these is an optimizer, in every process.
PROCESSES.set_forkserver_preload(
    ["hope.cli", "hope.training_state", "test_hope_kill", "torch._dynamo"]
)
STEPS = 20
LONGER = [*runs.OPTIONS, "--steps", str(STEPS)]
# A run whose state is more than AdamW's: levels that wait for their turn, and documents in an order
# that every epoch, of less than five steps, draws anew.
PACED = [
    "--preset=hope-tiny-cms",
    "--steps=10",
    *(
        f"--set={setting}"
        for setting in (
            *("data.packed=true", "train.level_periods=[1, 2, 4, 5]"),
            *("model.cms.chunk_sizes=[4, 8, 16, 32]", "model.dim=16", "model.layers=1"),
            *("model.mixer.heads=2", "model.mixer.head_dim=8", "model.mixer.chunk_size=8"),
            *("train.batch=4", "train.sequence=32", "train.lr=1e-2"),
            *("train.checkpoint_every=3", "train.validate_every=4", "train.validation_tokens=64"),
        )
    ),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(runs.TEXT)
    return str(path)


@pytest.fixture(scope="module")
def one_thread():
    """For the runs of a module, as for those of a test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(one_thread, tmp_path_factory, text):
    """A run that nothing has stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", "--data", text, "--out", str(out), *LONGER]) == 0
    return out


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("documents") / "lines.jsonl"
    texts = (f"{number} bottles of beer on the wall" for number in range(20))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="module")
def paced(one_thread, tmp_path_factory, documents):
    """A run with PACED that nothing has stopped."""
    out = tmp_path_factory.mktemp("paced") / "run"
    assert main(["train", "--data", documents, "--out", str(out), *PACED]) == 0
    return out


def command(text, out):
    """The command that begins the run in `out`, or goes on with it."""
    if has_checkpoint(out):
        return ["train", "--resume", "--out", str(out)]
    shutil.rmtree(out, ignore_errors=True)  # killed before its first checkpoint
    return ["train", "--data", text, "--out", str(out), *LONGER]


def assert_same_weights(out, whole):
    expected = load_model(whole).state_dict()
    for name, weight in load_model(out).state_dict().items():
        assert torch.equal(weight, expected[name]), name


def assert_same_run(out, whole):
    assert runs.without_times(runs.records(out)) == runs.without_times(runs.records(whole))
    assert_same_weights(out, whole)
    assert (out / "sample.txt").read_text() == (whole / "sample.txt").read_text()


def print_to(output):
    """What this process prints goes to a file."""
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)


def train(arguments, output):
    """`hope train` in a process of its own."""
    print_to(output)
    os._exit(main(arguments))


def train_to(moment, arguments, output):
    """The same; it kills itself at a moment."""
    die_at(*moment)
    train(arguments, output)


def die_at(name, number, before):
    """This process will kill itself at a call of a function, counted from 1: before or after it."""
    owner, _, function = name.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    original, calls = getattr(owner, function), itertools.count(1)

    def deadly(*arguments, **options):
        here = next(calls) == number
        if here and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if here:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, function, deadly)


def run_to_death(target, *arguments, output):
    """Calls it in a process of its own, which must end by SIGKILL."""
    process = PROCESSES.Process(target=target, args=(*arguments, output))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL, output.read_text()


# A function that writing the second checkpoint calls, and the other arguments of die_at.
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
    run_to_death(train_to, MOMENTS[moment], command(text, out), output=tmp_path / "output")
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


def test_a_kill_between_documents_and_between_the_turns_of_levels(tmp_path, documents, paced):
    """In the middle of the second epoch, and of the periods of two levels."""
    out, moment = tmp_path / "run", ("hope.train.trainer.Trainer._train_step", 8, True)
    begin = ["train", "--data", documents, "--out", str(out), *PACED]
    run_to_death(train_to, moment, begin, output=tmp_path / "output")
    assert find_checkpoint(out).name == "step-00000006"
    assert runs.records(out)[-1]["step"] == 7  # which is written again
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert_same_run(out, paced)


# ---- hope learn ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lesson(paced, tmp_path_factory):
    """A text for the paced run: 67 segments of 4 tokens, with a checkpoint after every 15.

    Then two levels wait for their turn, and the carried state is that of the middle of a context.
    """
    text = tmp_path_factory.mktemp("lesson") / "new.txt"
    text.write_text("12 + 34 = 46, 5 + 6 = 11\n" * 12)
    learn = learn_config(load_config(find_checkpoint(paced)), checkpoint_every=60)
    return Lesson(str(paced), (str(text),), (), learn)


@pytest.fixture(scope="module")
def learned(one_thread, lesson, tmp_path_factory):
    """What it has become when nothing has stopped it."""
    out = tmp_path_factory.mktemp("learned") / "run"
    LearnRun(lesson, out).run(progress=False)
    return out


def learn_to(moment, lesson, out, output):
    """`hope learn`, which has no option for checkpoint_every, until it kills itself at a moment."""
    print_to(output)
    die_at(*moment)
    LearnRun(lesson, out).run(progress=False)
    os._exit(0)


# The arguments of die_at, and the checkpoint that is left. The first is of step 0.
LEARNING = {
    "while it reads": (("hope.continual.learner.Learner.read", 39, False), 30),
    "before the new name": (("os.rename", 3, True), 15),
    "after the new name": (("os.rename", 3, False), 30),
}


@pytest.mark.parametrize(("moment", "step"), LEARNING.values(), ids=LEARNING)
def test_a_kill_while_it_learns(tmp_path, lesson, learned, moment, step):
    out = tmp_path / "run"
    run_to_death(learn_to, moment, lesson, out, output=tmp_path / "output")
    assert find_checkpoint(out).name == f"step-{step:08d}"
    assert main(["learn", "--resume", "--out", str(out)]) == 0
    assert runs.without_times(runs.records(out)) == runs.without_times(runs.records(learned))
    assert_same_weights(out, learned)
    (state, form), (expected, same_form) = (pytree.tree_flatten(lasting(r)) for r in (out, learned))
    assert form == same_form
    for value, wanted in zip(state, expected, strict=True):
        assert torch.equal(value, wanted) if torch.is_tensor(wanted) else value == wanted
    result, expected = (json.loads((run / "learn.json").read_text()) for run in (out, learned))
    assert result["bits_per_byte"] == expected["bits_per_byte"]


def lasting(run):
    """The learner's state at the end of a lesson, without the time it took."""
    state = learned_state(find_checkpoint(run))
    del state["seconds"]
    return state
