"""One step in other ways: in parts, with activations computed again, compiled; and schedules."""

import functools
from dataclasses import replace

import pytest
import runs
import torch
import torch._inductor.config
from hope import (
    CmsConfig,
    HopeConfig,
    HopeError,
    LanguageModel,
    TrainConfig,
    Trainer,
    load_corpus,
    preset,
)
from hope.config import override
from hope.data import IGNORED, Batch
from hope.layers import spectral
from hope.train import learning_rate
from torch._dynamo.utils import counters


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(runs.TEXT)
    return load_corpus([str(path)], window=32)


def gradients(trainer):
    """The loss of the next step, and its gradient by name."""
    loss = trainer._backward(trainer._take_batches(), trainer.loss)
    return loss, {name: p.grad for name, p in trainer.model.named_parameters()}


# ---- parts of a batch ----------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_has_the_same_gradient(tmp_path, corpus, parts):
    whole = Trainer(runs.CONFIG, corpus, tmp_path / "whole")
    split = Trainer(runs.training(accumulate=parts), corpus, tmp_path / "split")
    for _ in range(3):  # the same text, step by step
        for a, b in zip(*(t.model.parameters() for t in (whole, split)), strict=True):
            b.data.copy_(a.data)
        (loss, expected), (split_loss, got) = gradients(whole), gradients(split)
        torch.testing.assert_close(split_loss, loss, rtol=1e-6, atol=0)
        for name, gradient in expected.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6 * scale)
        for trainer in (whole, split):
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
    assert whole.sampler.state_dict() == split.sampler.state_dict()


def test_parts_weigh_as_many_targets_as_they_count(tmp_path, corpus):
    trainer = Trainer(runs.CONFIG, corpus, tmp_path / "run")
    tokens, targets, _ = trainer.sampler.next_batch()
    targets = targets.clone()
    targets[0, 3:] = IGNORED  # 3 in the first half, 64 in the second
    targets[1] = IGNORED
    whole = Batch(tokens, targets)
    halves = [Batch(tokens[:2], targets[:2]), Batch(tokens[2:], targets[2:])]
    results = []
    for batches in ([whole], halves):
        loss = trainer._backward(batches, trainer.loss)
        results.append([loss, *(p.grad for p in trainer.model.parameters())])
        trainer.optimizer.zero_grad()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_parts_are_the_text_of_the_whole(tmp_path, corpus, packed):
    settings = [f"data.packed={str(packed).lower()}"]
    read = []
    for parts in (1, 2):
        config = override(runs.training(accumulate=parts), settings)
        trainer = Trainer(config, corpus, tmp_path / str(parts))
        steps = [trainer._take_batches() for _ in range(3)]
        assert {len(batches) for batches in steps} == {parts}
        tokens = [batch.tokens.flatten() for batches in steps for batch in batches]
        read.append(torch.cat(tokens))
    assert torch.equal(*read)


def test_a_part_is_what_is_computed_at_once(tmp_path, corpus):
    trainer = Trainer(runs.training(accumulate=2), corpus, tmp_path / "run")
    shapes, loss = [], trainer.loss
    trainer.loss = lambda *batch: shapes.append(batch[0].shape) or loss(*batch)
    record = trainer._train_step()
    assert shapes == [(2, 32), (2, 32)]
    assert record["tokens"] == 4 * 32


def test_parts_must_divide_the_batch():
    with pytest.raises(HopeError, match=r"train.accumulate must be a divisor of batch \(16\), not"):
        override(runs.CONFIG, ["train.batch=16", "train.accumulate=3"])
    with pytest.raises(HopeError, match=r"train.accumulate must be at least 1, not 0"):
        override(runs.CONFIG, ["train.accumulate=0"])


# ---- activations computed again ------------------------------------------------------------------

MODELS = {
    "titans": replace(runs.MODEL, layers=3),
    "hope, with a memory system": replace(
        runs.MODEL,
        layers=2,
        mlp_ratio=2.0,
        mixer=HopeConfig(heads=2, head_dim=8, chunk_size=8),
        cms=CmsConfig((8, 16), updates=True),
    ),
}


def kept_bytes(loss):
    """The loss, and the bytes of different tensors that autograd has kept for it."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return loss(), sum(kept.values())


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_activations_computed_again_give_the_same_gradient_and_are_not_kept(config):
    torch.manual_seed(0)
    model = LanguageModel(config)
    tokens = torch.randint(0, 256, (2, 65))
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    results = []
    for model.checkpoint_activations in (False, True):
        inputs = []  # of the blocks: what checkpoints keep, which autograd does not see
        handles = [
            block.register_forward_pre_hook(lambda _, args, kept=inputs: kept.append(args[0]))
            for block in model.blocks
        ]
        loss, size = kept_bytes(lambda: model.loss(tokens[:, :-1], tokens[:, 1:]))
        if model.checkpoint_activations:
            size += sum(x.nbytes for x in inputs)
        for handle in handles:
            handle.remove()
        model.zero_grad()
        loss.backward()
        gradient = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), gradient, size - weights))
    (loss, expected, size), (same_loss, got, less) = results
    assert torch.equal(loss, same_loss)
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)
    assert less < 0.5 * size


def test_nothing_is_computed_again_without_a_gradient():
    model = LanguageModel(runs.MODEL)
    model.checkpoint_activations = True
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    tokens = torch.randint(0, 256, (1, 9))
    with torch.no_grad():
        _, state = model(tokens, return_state=True)
    model(tokens, state, return_state=True)[0].sum().backward()
    assert len(calls) == 3  # without a gradient; with one; again on the way back


def test_a_run_with_all_of_it_is_the_run_without(tmp_path, corpus):
    """Nothing but rounding differs when the batch is split, and activations are computed again."""
    results = []
    for name, changes in (
        ("plain", {}),
        ("again", {"checkpoint_activations": True}),
        ("parts", {"checkpoint_activations": True, "accumulate": 2, "dtype": "bfloat16"}),
    ):
        trainer = Trainer(runs.training(**changes), corpus, tmp_path / name)
        results.append(trainer.run(progress=False).validation_bits_per_byte)
    assert results[1] == results[0]
    assert results[2] == pytest.approx(results[0], abs=0.02)


def test_compiled_it_is_the_same(tmp_path, corpus, monkeypatch):
    """Parts and checkpoints, traced forward and backward; code generation would take minutes."""
    traced = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", traced)
    losses = []
    for compiled in (False, True):
        changes = {"accumulate": 2, "checkpoint_activations": True, "compile": compiled}
        config = replace(runs.training(**changes), model=replace(runs.MODEL, layers=2))
        trainer = Trainer(config, corpus, tmp_path / str(compiled))
        losses.append([trainer._train_step()["train_bits_per_byte"] for _ in range(2)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_inductor_gives_the_same(tmp_path, corpus, monkeypatch):
    """What `train.compile` means, with nothing in its place, for a small HOPE model.

    But PyTorch's kernels run: inductor's own are some twenty here, and a compiler needs a second or
    two for each. tests/test_ops.py has those around every operator compiled.
    """
    # These are unrolled, and would be half of the graph.
    monkeypatch.setattr(spectral, "_ITERATIONS", 1)
    small = ["model.dim=16", "model.layers=1", "model.mixer.heads=2", "model.mixer.head_dim=8"]
    small += ["train.batch=4", "train.sequence=32", "train.accumulate=2"]
    settings = {"force_disable_caches": True, "compile_threads": 1}
    if hasattr(torch._inductor.config, "fallback_by_default"):  # a torch without it takes longer
        settings["fallback_by_default"] = True
    torch._dynamo.reset()
    counters.clear()
    losses = []
    for compiled in ("false", "true"):
        config = override(preset("hope-tiny"), [*small, f"train.compile={compiled}"])
        trainer = Trainer(config, corpus, tmp_path / compiled)
        with torch._inductor.config.patch(settings):
            losses.append([trainer._train_step()["train_bits_per_byte"] for _ in range(2)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert counters["stats"]["unique_graphs"] == 1  # of both steps, whole
    assert counters["inductor"]["extern_calls"] > 0


# ---- schedules -----------------------------------------------------------------------------------


def test_wsd_warms_up_stays_and_goes_down_in_a_line():
    config = TrainConfig(
        *(100, 1, 1, 1), lr=2.0, lr_final=0.1, schedule="wsd", warmup=0.1, decay=0.3
    )
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert rates[10:71] == [2.0] * 61
    assert rates[70:] == pytest.approx([2.0 - 1.8 * n / 30 for n in range(31)])
    assert rates[100] == pytest.approx(0.2)


def test_wsd_of_any_length_stays_between_its_rates():
    for steps in range(1, 30):
        for warmup, decay in ((0.0, 1.0), (0.05, 0.01), (0.5, 0.5)):
            config = TrainConfig(*(steps, 1, 1, 1), schedule="wsd", warmup=warmup, decay=decay)
            rates = [learning_rate(config, step) for step in range(steps)]
            assert all(0 < rate <= config.lr for rate in rates), (steps, warmup, decay)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.schedule=step"], "train.schedule must be 'cosine', 'linear' or 'wsd', not 'step'"),
        (
            ["train.schedule=wsd", "train.decay=0.97"],
            r"train.decay must be in \(0, 0.95\], after warmup, not 0.97",
        ),
        (["train.schedule=wsd", "train.decay=0"], r"train.decay must be in \(0, 0.95\]"),
        (["train.wandb="], "train.wandb must be the name of a project or null, not ''"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(HopeError, match=message):
        override(runs.CONFIG, settings)
