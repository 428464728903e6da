"""`hope evaluate`: the tasks against their rules told in Python, the judging, and the command."""

import json
import re

import pytest
import torch
from hope import HopeError, preset
from hope.cli import main
from hope.evaluate import (
    IGNORED,
    TASKS,
    Recall,
    StateTracking,
    accuracy,
    equal_sized,
    evaluation,
)
from hope.evaluate.evaluation import small
from hope.model import parameter_count
from torch import nn

import hope_ext

NAMES = ["hope-tiny", "tiny"]
SMALL = ["--set", "model.dim=16", "--set", "model.layers=1", "--set", "model.mixer.head_dim=8"]


def recalled(row):
    """What is asked in a text of pairs, by reading it from left to right."""
    pairs = len(row) // 4
    told = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
    assert len(told) == pairs  # no key twice
    asked = row[2 * pairs :: 2]
    assert sorted(asked) == sorted(told)
    answers = [told[key] for key in asked]
    assert row[2 * pairs + 1 :: 2] == answers
    return [IGNORED] * 2 * pairs + [x for a in answers for x in (a, IGNORED)]


def counted(row):
    """The count of ones so far at every bit, modulo what the first token names."""
    modulus, count, answers = {2: 2, 3: 5}[row[0]], 0, [IGNORED]
    for bit in row[1:]:
        assert bit in (0, 1)
        count += bit
        answers.append(4 + count % modulus)
    return answers


@pytest.mark.parametrize(("name", "rule"), [("recall", recalled), ("state-tracking", counted)])
def test_training_batches_follow_the_rule(name, rule):
    task, generator = TASKS[name], torch.Generator().manual_seed(0)
    lengths = set()
    for _ in range(40):
        tokens, targets = task.sample(3, generator)
        assert tokens.shape == targets.shape
        assert tokens.dtype == targets.dtype == torch.int64
        assert tokens.min() >= 0
        assert max(tokens.max(), targets.max()) < task.vocab_size
        lengths.add(tokens.shape[1])
        assert [rule(row) for row in tokens.tolist()] == targets.tolist()
    assert lengths == ({8, 16, 32, 64} if name == "recall" else {9, 17, 33})
    assert max(lengths) == task.longest


def test_every_setting_asks_what_its_name_says():
    generator = torch.Generator().manual_seed(1)
    for name, setting in Recall.settings.items():
        tokens, targets = Recall().sample(2, generator, **setting)
        assert f"{tokens.shape[1] // 4} pairs" == name
        assert targets.tolist() == [recalled(row) for row in tokens.tolist()]
    for name, setting in StateTracking.settings.items():
        tokens, targets = StateTracking().sample(2, generator, **setting)
        modulus = {2: 2, 3: 5}[int(tokens[0, 0])]
        assert f"mod {modulus}, {tokens.shape[1] - 1} bits" == name
        assert (targets[:, :-1] == IGNORED).all()
        assert targets[:, -1].tolist() == [counted(row)[-1] for row in tokens.tolist()]


class Rule(nn.Module):
    """A model that is right by `rule` at the first `share` of a batch's rows, and elsewhere at a
    loss. It keeps what it has read.
    """

    def __init__(self, task, rule, share=1.0):
        super().__init__()
        self.embedding = nn.Embedding(task.vocab_size, 1)
        self.rule, self.share, self.seen = rule, share, []

    def forward(self, tokens):
        self.seen.append(tokens)
        answers = torch.tensor([self.rule(row) for row in tokens.tolist()]).clamp(min=0)
        answers[int(self.share * len(tokens)) :] = 0  # no answer of either task
        return nn.functional.one_hot(answers, self.embedding.num_embeddings).float()


@pytest.mark.parametrize(("name", "rule"), [("recall", recalled), ("state-tracking", counted)])
def test_accuracy_is_the_share_of_right_answers(name, rule):
    task = TASKS[name]
    model, again, other = Rule(task, rule), Rule(task, rule, 0.25), Rule(task, rule)
    assert accuracy(task, model) == dict.fromkeys(task.settings, 1.0)
    assert accuracy(task, again) == dict.fromkeys(task.settings, 0.25)
    accuracy(task, other, seed=1)
    assert all(map(torch.equal, model.seen, again.seen))
    assert not any(map(torch.equal, model.seen, other.seen))


def test_models_of_an_evaluation_are_equal_in_size():
    task = TASKS["recall"]
    names = ("hope-tiny", "tiny", "tiny-transformer", "tiny-deep", "tiny-mac")
    configs = equal_sized([small(preset(name), task, 7) for name in names])
    first, *others = (parameter_count(config.model) for config in configs)
    for other in others:
        assert abs(other / first - 1) < 0.03
    assert {config.train.steps for config in configs} == {7}
    with pytest.raises(HopeError, match=r"a model of tiny-mac .* has [\d,]+ parameters at least"):
        equal_sized(
            [small(preset(n), task, 7, ["model.mlp_ratio=0.1"]) for n in ("tiny", names[-1])]
        )


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def evaluate(*arguments, task="recall", names=NAMES):
    return main(["evaluate", task, *names, "--steps", "3", *SMALL, *arguments])


@pytest.mark.parametrize("task", TASKS)
def test_evaluate_trains_judges_and_writes(task, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "_EXAMPLES", 32)
    assert evaluate(task=task) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "runs" / task / "evaluate.json").read_text())
    assert result["task"] == task
    assert result["build"] == hope_ext.build_info()
    assert [run["preset"] for run in result["runs"]] == NAMES
    for run in result["runs"]:
        assert len(run["loss"]) == run["steps"] == 3
        assert list(run["accuracy"]) == list(TASKS[task].settings)
        assert all(0 <= value < 0.9 for value in run["accuracy"].values())
    for line in result["table"]:
        assert line in out


def test_a_stopped_evaluation_goes_on_with_the_next_model(tmp_path, capsys):
    assert evaluate() == 0
    path = tmp_path / "runs" / "recall" / "evaluate.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"runs": [whole["runs"][0] | {"seconds": 123456.0}]}))
    assert evaluate("--resume") == 0
    assert "123,456" in capsys.readouterr().out
    first, second = json.loads(path.read_text())["runs"]
    assert first["seconds"] == 123456.0
    assert second | {"seconds": 0} == whole["runs"][1] | {"seconds": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "."), "is not empty; continue that evaluation with --resume"),
        (("--resume",), "there is no evaluation in runs/recall"),
        (("--resume", "--out", "old"), "is an evaluation of recall with .* its own settings"),
        (("--set", "train.batch=0"), "train.batch must be at least 1, not 0"),
    ],
)
def test_what_evaluate_refuses(tmp_path, capsys, arguments, message):
    (tmp_path / "notes.txt").write_text("x")
    if "old" in arguments:
        assert evaluate("--out", "old", "--set", "train.seed=3") == 0
        capsys.readouterr()
    refused(capsys, message, *arguments)


def refused(capsys, message, *arguments, names=NAMES):
    assert evaluate(*arguments, names=names) == 2
    error = capsys.readouterr().err
    assert error.startswith("hope: error: ")
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_evaluate_refuses_presets_that_it_cannot_tell_apart(capsys):
    refused(capsys, "preset 'tiny' is named twice", names=["tiny", "tiny"])
    refused(capsys, "unknown preset 'mamba'", names=["mamba"])


def test_an_unknown_task_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "chess"])
    assert "recall" in capsys.readouterr().err


def test_a_small_model_learns_to_count(tmp_path):
    """Parity of what is in sight is within reach of one layer in 150 steps, and chance is 0.4."""
    arguments = ("--steps", "150", "--set", "model.layers=1", "--set", "train.lr=1e-2")
    assert main(["evaluate", "state-tracking", "tiny", *arguments]) == 0
    (run,) = json.loads((tmp_path / "runs/state-tracking/evaluate.json").read_text())["runs"]
    assert sum(run["loss"][-10:]) < 0.8 * sum(run["loss"][:10])
