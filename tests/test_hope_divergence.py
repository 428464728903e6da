"""A run that diverges says which tensor was the first that is no number, and what is left."""

import math
import re
from dataclasses import replace

import pytest
import runs
import torch
from hope import Trainer, TrainingDiverged, load_corpus, load_model
from hope.cli import main
from hope.train.divergence import first_bad_tensor

CONFIG = replace(runs.CONFIG, model=replace(runs.MODEL, layers=2))


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(runs.TEXT)
    return load_corpus([str(path)], window=32)


def report(trainer, step, plant):
    """What the run says that `plant` breaks in `step`."""
    runs.interrupt(trainer, step, plant)
    with pytest.raises(TrainingDiverged) as error:
        trainer.run(progress=False)
    return str(error.value)


@torch.no_grad()
def plant_nan(parameter, *index):
    parameter[index] = math.nan


@pytest.mark.parametrize("name", ["embedding.weight", "blocks.1.mixer.out.weight"])
def test_a_weight_that_is_nan_is_named(tmp_path, corpus, name):
    trainer = Trainer(CONFIG, corpus, tmp_path / "run")
    parameter = trainer.model.get_parameter(name)
    message = report(trainer, 3, lambda: plant_nan(parameter, slice(2, 4), 5))
    assert re.match(
        r"training diverged at step 3 \(train bits per byte nan, gradient norm", message
    )
    shape = re.escape(str(list(parameter.shape)))
    assert re.search(
        rf"first tensor that is not finite: the parameter {name}, of shape {shape} "
        rf"\(2 NaN of {parameter.numel()} numbers\); the newest checkpoint is from before, and "
        r"good: \S+run/checkpoints/step-00000002\. A lower",
        message,
    )
    assert all(p.isfinite().all() for p in load_model(tmp_path / "run").parameters())


def test_the_layer_whose_output_overflows_is_named(tmp_path, corpus):
    trainer = Trainer(CONFIG, corpus, tmp_path / "run")
    down = trainer.model.blocks[1].mlp.down

    @torch.no_grad()
    def blow_up():
        down.weight.fill_(3e38)

    message = report(trainer, 1, blow_up)
    # Also blocks.1 and all that follows are not finite, but end later.
    assert "finite: the output of blocks.1.mlp.down, of shape [4, 32, 16] (" in message
    assert "infinite of 2048 numbers); no checkpoint was written yet" in message


def test_in_parts_it_is_the_same(tmp_path, corpus):
    config = replace(CONFIG, train=replace(runs.TRAIN, accumulate=2, checkpoint_activations=True))
    trainer = Trainer(config, corpus, tmp_path / "run")
    down = trainer.model.blocks[1].mlp.down.weight.data
    message = report(trainer, 1, lambda: down.fill_(3e38))
    assert "finite: the output of blocks.1.mlp.down, of shape [2, 32, 16] (" in message


def test_a_gradient_that_alone_is_nan_is_named(tmp_path, corpus):
    trainer = Trainer(CONFIG, corpus, tmp_path / "run")
    up = trainer.model.blocks[0].mlp.up.weight
    message = report(trainer, 3, lambda: up.register_hook(lambda gradient: gradient * math.nan))
    assert re.search(r"\(train bits per byte \d\.\d+, gradient norm nan, ", message)
    assert f"finite: the gradient of blocks.0.mlp.up.weight, of shape {list(up.shape)}" in message


def test_a_loss_that_alone_overflows_is_named(tmp_path, corpus, monkeypatch):
    trainer = Trainer(CONFIG, corpus, tmp_path / "run")
    loss = trainer.model.loss
    monkeypatch.setattr(trainer.model, "loss", lambda *batch: loss(*batch) * math.inf)
    trainer.loss = trainer.model.loss
    message = report(trainer, 1, lambda: None)
    assert "finite: the loss, of shape [] (1 infinite of 1 numbers)" in message


def test_of_gradients_the_first_on_the_way_back_is_named(tmp_path, corpus):
    """The gradient of what blocks.1 gives, and so of all before it."""
    trainer = Trainer(CONFIG, corpus, tmp_path / "run")

    def break_gradient(module, inputs, output):
        output[0].register_hook(lambda gradient: gradient * math.inf)

    message = report(
        trainer, 1, lambda: trainer.model.blocks[1].register_forward_hook(break_gradient)
    )
    assert "finite: the gradient of the output of blocks.1, of shape [4, 32, 16]" in message


def test_a_norm_that_overflows_is_named(tmp_path, corpus):
    trainer = Trainer(CONFIG, corpus, tmp_path / "run")
    up = trainer.model.blocks[0].mlp.up.weight
    message = report(trainer, 1, lambda: up.register_hook(lambda g: torch.full_like(g, 1e30)))
    assert "the norm of the gradient of blocks.0.mlp.up.weight, the largest entry of" in message
    assert "gradient norm inf" in message


def test_weights_that_an_update_has_broken_are_no_checkpoint(tmp_path, corpus):
    trainer = Trainer(runs.training(validate_every=8), corpus, tmp_path / "run")
    step = trainer.optimizer.step

    def break_weights():
        step()
        if trainer.step == 3:  # step 4, after which comes a checkpoint
            plant_nan(trainer.model.norm.weight, 0)

    trainer.optimizer.step = break_weights
    message = "diverged at the update of step 4. .*: the parameter norm.weight, .*step-00000002"
    with pytest.raises(TrainingDiverged, match=message):
        trainer.run(progress=False)
    assert all(p.isfinite().all() for p in load_model(tmp_path / "run").parameters())


def test_a_validation_that_is_no_number_stops_the_run(tmp_path, corpus, monkeypatch):
    trainer = Trainer(runs.CONFIG, corpus, tmp_path / "run")
    monkeypatch.setattr("hope.train.trainer.bits_per_byte", lambda *_, **__: math.inf)
    with pytest.raises(
        TrainingDiverged, match=r"the validation after step 2 \(.* byte inf\).*not a param"
    ):
        trainer.run(progress=False)


def test_a_step_that_is_fine_has_no_bad_tensor_and_keeps_no_gradient(tmp_path, corpus):
    trainer = Trainer(CONFIG, corpus, tmp_path / "run")
    batches = trainer._take_batches()
    hooks = sum(len(module._forward_hooks) for module in trainer.model.modules())
    assert first_bad_tensor(trainer.model, lambda loss: trainer._backward(batches, loss)) is None
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert sum(len(module._forward_hooks) for module in trainer.model.modules()) == hooks


def test_the_command_says_it_and_fails(tmp_path, corpus, capsys):
    options = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
    assert main(["train", *options, *runs.OPTIONS, "--set", "train.lr=1e30"]) == 1
    error = capsys.readouterr().err
    assert "hope: training diverged at " in error
    assert "The first tensor that is not finite: the " in error
