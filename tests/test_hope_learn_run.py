"""`hope learn`: its report, its checkpoints, stopping, and what it refuses."""

import json
import math
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hope import LanguageModel, load_config, load_corpus, load_model
from hope.checkpoint import find_checkpoint
from hope.cli import main
from hope.config import DataConfig, override
from hope.continual import Learner, learn_config
from hope.continual.run import load_lesson
from hope.tokenizers import load_tokenizer
from hope.train import bits_per_byte

SMALL = [
    *("--set", "model.dim=16", "--set", "model.layers=1", "--set", "model.mixer.head_dim=8"),
    *("--set", "model.mixer.heads=2", "--set", "train.batch=2", "--set", "train.sequence=32"),
    *("--set", "train.validation_tokens=64"),
]
LEVELS = ["--set", "model.cms.chunk_sizes=[8, 16, 32, 512]"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory with two runs and two texts."""
    path = tmp_path_factory.mktemp("runs")
    (path / "old.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    (path / "new.txt").write_text("12 + 34 = 46, 5 + 6 = 11\n" * 20)  # 500 bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        for name, more in (("hope-tiny-cms", LEVELS), ("tiny-transformer", [])):
            train = ["train", "--preset", name, "--data", "old.txt", "--steps", "3"]
            assert main([*train, *SMALL, *more, "--out", name]) == 0
    return path


@pytest.fixture
def trained(runs, tmp_path, monkeypatch):
    """A copy of it, in which the test runs."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def learn(*arguments):
    return main(["learn", *arguments])


def weights(run):
    return load_model(run).state_dict()


def test_learn_reports_and_leaves_an_ordinary_checkpoint(trained, capsys):
    assert learn("--checkpoint", "hope-tiny-cms", "--text", "new.txt", "--lr", "1e-2") == 0
    out = capsys.readouterr().out
    result = json.loads((trained / "runs/learn/learn.json").read_text())
    bits = result["bits_per_byte"]
    assert bits["after"]["new"] < bits["before"]["new"]
    for name in ("new", "old"):
        before, after = bits["before"][name], bits["after"][name]
        assert re.search(rf"{name} text, held out +{before:.4f} +{after:.4f} +[+-]", out)
    assert result["tokens"] == 500 - 33  # all but what is held out and the last
    assert result["texts"]["old"].startswith("old.txt")  # the run's own data
    for file in ("learn.json", "metrics.jsonl", "loss.png", "checkpoints/step-"):
        assert f"runs/learn/{file}" in out
    old, new = weights("hope-tiny-cms"), weights("runs/learn")
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    fast = [f"blocks.0.cms.levels.{i}.mlp." for i in range(3)]  # the slowest is not due yet
    assert moved == {level + part for level in fast for part in ("up.weight", "down.weight")}
    for command in (["generate", "runs/learn"], ["learn", "--checkpoint", "runs/learn"]):
        more = ["--length", "5"] if command[0] == "generate" else ["--text", "new.txt"]
        assert main([*command, *more]) == 0
    assert main(["evaluate", "lm", "runs/learn", "--data", "new.txt"]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "--out", "runs/learn"]) == 2  # it is no training's
    assert "hope: error: " in capsys.readouterr().err


def test_the_next_text_goes_on_with_what_is_pending(trained, capsys):
    """The slowest level is due after 512 tokens: in the second text."""
    slow = "blocks.0.cms.levels.3.mlp.down.weight"
    start = weights("hope-tiny-cms")[slow]
    assert learn("--checkpoint", "hope-tiny-cms", "--text", "new.txt", "--out", "a") == 0
    assert learn("--checkpoint", "a", "--text", "new.txt", "--out", "b") == 0
    assert learn("--checkpoint", "a", "--text", "new.txt", "--out", "c", "--anew") == 0
    assert torch.equal(weights("a")[slow], start)
    assert not torch.equal(weights("b")[slow], start)
    assert torch.equal(weights("c")[slow], start)
    capsys.readouterr()
    assert learn("--checkpoint", "a", "--text", "new.txt", "--rule", "sgd") == 2
    error = capsys.readouterr().err
    assert "rule was adamw when this checkpoint learned, not sgd; --anew drops" in error
    # What it was told before holds: the same call with all of it spelled out gives the same.
    spelled = ("--rule", "adamw", "--chunks", "8", "16", "32", "512", "--segment", "8")
    assert learn("--checkpoint", "a", "--text", "new.txt", "--out", "d", *spelled) == 0
    assert all(torch.equal(w, weights("b")[name]) for name, w in weights("d").items())


def test_fine_tuning_moves_every_weight_of_a_transformer(trained):
    assert learn("--checkpoint", "tiny-transformer", "--text", "new.txt", "--old", "old.txt") == 0
    old, new = weights("tiny-transformer"), weights("runs/learn")
    assert not any(torch.equal(old[name], new[name]) for name in old)
    result = json.loads((trained / "runs/learn/learn.json").read_text())
    assert result["learned_parameters"] == result["parameters"]
    assert result["lesson"]["old"] == ["old.txt"]
    run, model = load_config(find_checkpoint(Path("runs/learn"))), load_model("runs/learn")
    whole = torch.tensor([256, *Path("old.txt").read_bytes()]).short()
    bits = result["bits_per_byte"]["after"]["old"]  # all of it is held out
    assert bits == pytest.approx(bits_per_byte(model, whole, run.train))


def test_a_stopped_run_resumes_bit_for_bit(trained, capsys, monkeypatch):
    """As one that is killed does: tests/test_hope_kill.py."""
    call = ("--checkpoint", "hope-tiny-cms", "--text", "new.txt")
    assert learn(*call, "--out", "whole") == 0
    read_, count = Learner.read, [0]

    def ends(learner, tokens):
        count[0] += 1
        if count[0] == 13:
            signal.raise_signal(signal.SIGTERM)
        return read_(learner, tokens)

    monkeypatch.setattr(Learner, "read", ends)
    assert learn(*call, "--out", "cut") == 128 + signal.SIGTERM
    out = capsys.readouterr().out
    assert "after 104 tokens; continue with: hope learn --resume --out cut" in out
    monkeypatch.setattr(Learner, "read", read_)
    assert learn("--resume", "--out", "cut") == 0
    assert all(torch.equal(w, weights("whole")[name]) for name, w in weights("cut").items())
    whole, cut = (json.loads(Path(name, "learn.json").read_text()) for name in ("whole", "cut"))
    assert cut["bits_per_byte"] == whole["bits_per_byte"]
    capsys.readouterr()
    assert learn("--resume", "--out", "cut") == 0  # finished
    assert "continued after 467 tokens" in capsys.readouterr().out


def learner_state(run, settings):
    """What the learner of a run's model, with other settings, has after a segment."""
    config = override(load_config(find_checkpoint(Path(run))), settings)
    learner = Learner(LanguageModel(config.model), config, learn_config(config))
    learner.read(torch.arange(learner.config.segment + 1))
    return learner.state_dict()


def test_what_learn_refuses(trained, capsys):
    def refused(*arguments):
        capsys.readouterr()
        assert learn(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("hope: error: ")
        assert error.count("\n") == 1
        return error

    hope, text_ = ("--checkpoint", "hope-tiny-cms"), ("--text", "new.txt")
    assert "--text is missing" in refused(*hope)
    assert "--checkpoint is missing" in refused(*text_)
    assert "no such run or checkpoint: absent" in refused("--checkpoint", "absent", *text_)
    assert "no such file or directory: absent.txt" in refused(*hope, "--text", "absent.txt")
    assert "no such file or directory: gone" in refused(*hope, *text_, "--old", "gone")
    assert "hope-tiny-cms is not empty; continue" in refused(*hope, *text_, "--out", hope[1])
    transformer = ("--checkpoint", "tiny-transformer", *text_)
    assert "method 'cms' needs a model with a CMS" in refused(*transformer, "--method", "cms")
    assert "hope-tiny-cms is no run of hope learn" in refused("--resume", "--out", hope[1])
    assert "lr must be above 0" in refused(*hope, *text_, "--lr", "0")
    assert not (trained / "runs").exists()
    (trained / "old.txt").rename(trained / "moved.txt")
    error = refused(*hope, *text_)
    assert "no such file or directory: old.txt; --old names other text than what" in error
    (trained / "moved.txt").rename(trained / "old.txt")
    assert learn(*hope, *text_, "--out", "mine") == 0
    again = ("--resume", "--out", "mine")
    assert "--resume takes no --text, --lr" in refused(*again, *text_, "--lr", "1")
    (newest,) = sorted((trained / "mine/checkpoints").iterdir())[-1:]
    saved, named = newest / "learner.pt", f"mine/checkpoints/{newest.name}/learner.pt"
    whole, state = saved.read_bytes(), torch.load(saved)
    saved.write_bytes(whole[:1000])
    assert f"cannot read the learner's state in {named}" in refused(*again)
    for other in ({"step": 3}, {**state, "more": 0}, [state]):
        torch.save(other, saved)
        assert f"{named} is not a learner's state\n" in refused(*again)
    for run, settings, why in (
        ("tiny-transformer", [], "loaded state dict"),
        ("hope-tiny-cms", ["model.layers=2"], "loaded state dict"),
        ("hope-tiny-cms", ["model.mixer=attention"], "what it carries is another model's"),
        ("hope-tiny-cms", ["model.dim=24"], "has the shape"),
        ("hope-tiny-cms", ["model.mixer.heads=1"], "expected shape"),
    ):
        torch.save({**state, "learner": learner_state(run, settings)}, saved)
        for call in (again, ("--checkpoint", "mine", *text_)):
            error = refused(*call)
            assert f"{named} is not the state of this model's learner: " in error
            assert why in error
    saved.write_bytes(whole)
    (trained / "new.txt").write_text("another text " * 50)
    assert "the text is not what the run in mine began with" in refused(*again)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_model_with_a_vocabulary_learns_in_its_tokens(trained, sharded):
    pytest.importorskip("tokenizers", reason="tokenizer.json is read by the package tokenizers")
    words = ["--data", "old.txt", "new.txt", "--vocab-size", "320", "--out", "words.json"]
    assert main(["tokenizer", *words]) == 0
    train = ["train", "--preset", "tiny-transformer", "--data", "old.txt", "--steps", "2"]
    vocabulary = ["--tokenizer", "words.json", "--set", "model.vocab_size=320"]
    assert main([*train, *SMALL, *vocabulary, "--out", "run"]) == 0
    (trained / "words.json").unlink()  # the checkpoint has it
    text = "new.txt"
    if sharded:
        own = str(next(trained.glob("run/checkpoints/*/tokenizer.json")))
        shards = ["--data", "new.txt", "--tokenizer", own, "--out", "shards"]
        assert main(["shards", *shards]) == 0
        text = "shards"
    assert learn("--checkpoint", "run", "--text", text, "--segment", "32") == 0
    result = json.loads((trained / "runs/learn/learn.json").read_text())
    assert result["tokens"] < 300  # of 500 bytes
    tokenizer = load_tokenizer(find_checkpoint(Path("runs/learn")))
    data = DataConfig(("new.txt",), str(find_checkpoint(Path("run")) / "tokenizer.json"))
    tokens = load_corpus(data, 32).train
    assert len(tokens) - 1 == result["tokens"]
    model, run = load_model("run"), load_config(find_checkpoint(Path("run")))
    learner = Learner(model, run, load_lesson(Path("runs/learn")).learn)
    nats = sum(learner.read(tokens[i : i + 33]) for i in range(0, len(tokens) - 1, 32))
    size = len(tokenizer.decode(tokens[1:].tolist()))
    bits = result["bits_per_byte"]["while_reading"]
    assert bits == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert main(["generate", "runs/learn", "--length", "3"]) == 0
