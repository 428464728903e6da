"""The trainer: it learns, stops, resumes bitwise, and leaves usable files whenever it is killed."""

import itertools
import math
import re
import signal
from dataclasses import replace

import pytest
import runs
import torch
from hope import (
    CmsConfig,
    HopeError,
    LanguageModel,
    RunConfig,
    TrainConfig,
    Trainer,
    TrainingDiverged,
    load_config,
    load_corpus,
    load_model,
)
from hope.checkpoint import find_checkpoint
from hope.config import override
from hope.optim import MultiFrequency
from hope.train import bits_per_byte, discard, learning_rate, make_optimizer
from torch import nn


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(runs.TEXT)
    return load_corpus([str(path)], window=32)


def test_the_loss_falls_and_every_file_is_there(tmp_path, corpus):
    config = replace(runs.CONFIG, train=replace(runs.TRAIN, tokens=60 * 4 * 32))
    trainer = Trainer(config, corpus, tmp_path / "run")
    before = bits_per_byte(trainer.model, corpus.validation, config.train)
    result = trainer.run(progress=False)
    assert result.validation_bits_per_byte < 0.6 * before
    assert (result.tokens, result.signal) == (60 * 4 * 32, None)
    assert set(result.files) == {"metrics", "checkpoint", "loss curve", "sample"}
    assert result.files["sample"].read_text() == result.sample != ""
    assert result.files["loss curve"].read_bytes().startswith(b"\x89PNG")
    records = runs.records(tmp_path / "run")
    assert [r["step"] for r in records if "lr" in r] == list(range(1, 61))
    assert [r["step"] for r in records if "validation_bits_per_byte" in r] == list(range(2, 61, 2))
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == config.train.keep_checkpoints
    assert load_config(result.files["checkpoint"]) == config
    model = load_model(tmp_path / "run")
    assert bits_per_byte(model, corpus.validation, config.train) == result.validation_bits_per_byte


def test_a_bar_on_stderr_goes_on_where_the_run_does(tmp_path, corpus, capsys):
    config = runs.training(tokens=4 * 4 * 32)
    trainer = Trainer(config, corpus, tmp_path / "run")
    runs.interrupt(trainer, 2, lambda: signal.raise_signal(signal.SIGINT))
    trainer.run()
    out, bar = capsys.readouterr()
    shown = r", loss=\d\.\d{3}, validation=\d\.\d{3}\]\n"
    assert re.search(r" 50%.* 256/512 \[" + f".*{shown}", bar)
    assert out == ""
    Trainer(config, corpus, tmp_path / "run", resume=True).run()
    out, bar = capsys.readouterr()
    assert re.match(r"\r *50%.* 256/512 \[", bar)
    assert re.search(r"100%.* 512/512 \[" + f".*{shown}", bar)
    Trainer(config, corpus, tmp_path / "silent").run(progress=False)
    assert capsys.readouterr() == ("", "")


def test_bits_per_byte_of_a_model_that_knows_nothing(corpus):
    model = LanguageModel(runs.MODEL)
    nn.init.zeros_(model.embedding.weight)  # also the head: all logits are 0
    value = bits_per_byte(model, corpus.validation, runs.TRAIN)
    assert value == pytest.approx(math.log2(runs.MODEL.vocab_size), rel=1e-5)


@pytest.fixture
def uninterrupted(tmp_path, corpus):
    trainer = Trainer(runs.CONFIG, corpus, tmp_path / "whole")
    trainer.run(progress=False)
    return runs.without_times(runs.records(tmp_path / "whole")), trainer.model.state_dict()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 4, 5])
def test_a_stopped_run_resumes_bitwise(tmp_path, corpus, uninterrupted, number, step):
    out = tmp_path / "stopped"
    trainer = Trainer(runs.CONFIG, corpus, out)
    runs.interrupt(trainer, step, lambda: signal.raise_signal(number))
    handler = signal.getsignal(number)
    result = trainer.run(progress=False)
    assert (result.signal, trainer.step, result.sample) == (number, step, None)
    assert signal.getsignal(number) == handler
    resumed = Trainer(runs.CONFIG, corpus, out, resume=True)
    assert resumed.step == step
    resumed.run(progress=False)
    records, weights = uninterrupted
    assert runs.without_times(runs.records(out)) == records
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_a_crashed_run_resumes_bitwise_from_its_last_checkpoint(tmp_path, corpus, uninterrupted):
    out = tmp_path / "crashed"
    trainer = Trainer(runs.CONFIG, corpus, out)

    def crash():
        raise MemoryError

    runs.interrupt(trainer, 6, crash)
    with pytest.raises(MemoryError):
        trainer.run(progress=False)
    assert runs.records(out)[-1]["step"] == 5
    with (out / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 6, "tok')  # as a kill in the middle of a write leaves it
    resumed = Trainer(runs.CONFIG, corpus, out, resume=True)
    assert resumed.step == 4
    resumed.run(progress=False)
    assert runs.without_times(runs.records(out)) == uninterrupted[0]


def test_a_second_signal_stops_at_once(tmp_path, corpus):
    trainer = Trainer(runs.CONFIG, corpus, tmp_path / "run")

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    runs.interrupt(trainer, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(progress=False)
    assert find_checkpoint(tmp_path / "run").name == "step-00000002"


def test_a_finished_run_can_be_resumed_and_is_finished(tmp_path, corpus):
    first = Trainer(runs.CONFIG, corpus, tmp_path / "run").run(progress=False)
    again = Trainer(runs.CONFIG, corpus, tmp_path / "run", resume=True).run(progress=False)
    assert again.validation_bits_per_byte == first.validation_bits_per_byte
    assert again.sample == first.sample


def test_divergence_is_reported_and_the_last_checkpoint_stays(tmp_path, corpus):
    trainer = Trainer(runs.CONFIG, corpus, tmp_path / "run")
    runs.interrupt(trainer, 4, lambda: trainer.model.norm.weight.data.fill_(math.nan))
    message = "diverged at step 4 .*bits per byte nan.*parameter norm.weight.*step-00000002"
    with pytest.raises(TrainingDiverged, match=message):
        trainer.run(progress=False)
    model = load_model(tmp_path / "run")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_used_directory_is_refused(tmp_path, corpus):
    (tmp_path / "run").mkdir()
    Trainer(runs.CONFIG, corpus, tmp_path / "run")  # an empty one is not
    (tmp_path / "run" / "notes").touch()
    with pytest.raises(HopeError, match="run is not empty; there is no checkpoint to continue"):
        Trainer(runs.CONFIG, corpus, tmp_path / "run")
    Trainer(runs.training(tokens=128), corpus, tmp_path / "done").run(progress=False)
    with pytest.raises(HopeError, match="done is not empty; continue that run with --resume"):
        Trainer(runs.CONFIG, corpus, tmp_path / "done")
    with pytest.raises(HopeError, match="done has a checkpoint"):
        discard(tmp_path / "done")


def test_what_was_killed_before_its_first_checkpoint_can_be_discarded(tmp_path, corpus):
    run = tmp_path / "run"
    Trainer(runs.training(tokens=128, tensorboard=True), corpus, run).run(progress=False)
    (run / "loss.png").unlink()
    (run / "sample.txt").unlink()
    find_checkpoint(run).rename(run / "checkpoints" / ".partial-step-00000001")
    discard(run)
    assert list(run.iterdir()) == []


def test_what_cannot_be_resumed_is_refused(tmp_path, corpus):
    with pytest.raises(HopeError, match="no such run or checkpoint"):
        Trainer(runs.CONFIG, corpus, tmp_path / "absent", resume=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(HopeError, match="no checkpoint in"):
        Trainer(runs.CONFIG, corpus, tmp_path / "empty", resume=True)
    Trainer(runs.CONFIG, corpus, tmp_path / "run").run(progress=False)
    other = replace(corpus, train=corpus.train.flip(0))
    with pytest.raises(HopeError, match="the data is not what the run"):
        Trainer(runs.CONFIG, other, tmp_path / "run", resume=True)


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path, corpus):
    config = replace(runs.CONFIG, model=replace(runs.MODEL, vocab_size=256))
    with pytest.raises(HopeError, match="vocab_size must be at least 257 for bytes, not 256"):
        Trainer(config, corpus, tmp_path / "run")


def test_the_learning_rate_warms_up_and_goes_down():
    config = TrainConfig(tokens=100, batch=1, sequence=1, lr=1.0, lr_final=0.1, warmup=0.1)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert rates[55] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    linear = replace(config, schedule="linear")
    assert learning_rate(linear, 55) == pytest.approx(0.55)
    assert learning_rate(linear, 32) == pytest.approx(0.1 + 0.9 * 68 / 90)


def test_weight_decay_is_for_matrices_of_linear_layers_and_embeddings():
    model = LanguageModel(runs.MODEL)
    decayed, others = make_optimizer(model, runs.TRAIN).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == runs.TRAIN.weight_decay
    assert others["weight_decay"] == 0
    assert {names[p] for p in others["params"] if not names[p].endswith("norm.weight")} == {
        *("blocks.0.mixer.conv.weight", "blocks.0.mixer.rates.bias", "blocks.0.mixer.memory.0")
    }
    assert all(p.ndim == 2 for p in decayed["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(names)


# The slow level moves every third step: steps 1, 4 and 5 are in the middle of a period.
PACED = RunConfig(
    model=replace(runs.MODEL, mlp_ratio=2.0, cms=CmsConfig((4, 8))),
    train=replace(runs.TRAIN, level_periods=(1, 3)),
)


def test_levels_move_once_in_their_period(tmp_path, corpus):
    trainer = Trainer(PACED, corpus, tmp_path / "run")
    fast, slow = trainer.model.blocks[0].cms.levels
    for step in range(1, 7):
        before = [level.mlp.up.weight.detach().clone() for level in (fast, slow)]
        trainer._train_step()
        moved = [
            not torch.equal(level.mlp.up.weight, old)
            for level, old in zip((fast, slow), before, strict=True)
        ]
        assert moved == [True, step % 3 == 0]


def test_periods_of_one_are_the_usual_optimizer(tmp_path, corpus):
    trainers = []
    for periods in ((), (1, 1)):
        config = replace(PACED, train=replace(PACED.train, level_periods=periods))
        trainer = Trainer(config, corpus, tmp_path / f"run{len(periods)}")
        for _ in range(5):
            trainer._train_step()
        trainers.append(trainer)
    kinds = [type(trainer.optimizer) for trainer in trainers]
    assert kinds == [torch.optim.AdamW, MultiFrequency]
    for a, b in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_groups_with_periods_have_every_weight_once():
    model = LanguageModel(PACED.model)
    groups = make_optimizer(model, PACED.train).param_groups
    assert [group["period"] for group in groups] == [1, 1, 3, 3]
    assert [group["weight_decay"] > 0 for group in groups] == [True, False] * 2
    slow = set(model.blocks[0].cms.levels[1].parameters())
    assert {p for group in groups[2:] for p in group["params"]} == slow
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("step", [4, 5])
def test_a_run_stopped_in_the_middle_of_a_period_resumes_bitwise(tmp_path, corpus, step):
    whole = Trainer(PACED, corpus, tmp_path / "whole")
    whole.run(progress=False)
    out = tmp_path / "stopped"
    trainer = Trainer(PACED, corpus, out)
    runs.interrupt(trainer, step, lambda: signal.raise_signal(signal.SIGINT))
    trainer.run(progress=False)
    resumed = Trainer(PACED, corpus, out, resume=True)
    assert resumed.step == step
    slow = resumed.model.blocks[0].cms.levels[1].mlp.up.weight
    assert resumed.optimizer.state[slow]["pending"].abs().max() > 0
    resumed.run(progress=False)
    assert runs.without_times(runs.records(out)) == runs.without_times(
        runs.records(tmp_path / "whole")
    )
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, whole.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.level_periods=[1]"], r"empty or one number for each of the 0 MLPs .* not \(1,\)"),
        (["model.cms={}", "train.level_periods=[1, 2]"], r"each of the 4 MLPs .*, not \(1, 2\)"),
        (["train.level_periods=[0]"], r"train.level_periods must be numbers above 0, not \(0,\)"),
        (["train.level_periods=3"], "train.level_periods must be a list of integers, not 3"),
    ],
)
def test_wrong_periods_are_named(settings, message):
    with pytest.raises(HopeError, match=message):
        override(RunConfig(), settings)
