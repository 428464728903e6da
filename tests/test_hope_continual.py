"""Models with a continuum memory system that begin as a trained Transformer."""

from dataclasses import replace

import pytest
import torch
from hope import (
    AttentionConfig,
    CmsConfig,
    HopeError,
    LanguageModel,
    ModelConfig,
    RunConfig,
    TrainConfig,
    Trainer,
    load_corpus,
    preset,
)
from hope.continual import from_transformer
from hope.train import make_optimizer

CONFIG = ModelConfig(mixer=AttentionConfig(heads=2, head_dim=8), dim=16, layers=2, mlp="gelu")
TRAIN = TrainConfig(
    tokens=8 * 4 * 32, batch=4, sequence=32, lr=1e-2, validation_tokens=128, checkpoint_every=8
)
VARIANTS = ("sequential", "independent", "nested")


def text(*shape):
    return torch.randint(0, 257, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def source():
    torch.manual_seed(0)
    return LanguageModel(CONFIG).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_updates_the_outputs_are_the_source_s_bit_for_bit(source, variant):
    model = from_transformer(source, CmsConfig((4, 8, 16), updates=False, variant=variant))
    tokens = text(2, 40)
    assert torch.equal(model(tokens), source(tokens))


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_updates_the_outputs_are_the_source_s_at_the_start(source, variant):
    model = from_transformer(source, CmsConfig((4, 8, 16), variant=variant))
    tokens = text(2, 200)
    logits, state = model(tokens, return_state=True)
    torch.testing.assert_close(logits, source(tokens), rtol=1e-4, atol=1e-4)
    for levels in state.cms:
        if variant != "nested":
            assert all(level.weights[1].count_nonzero() == 0 for level in levels[1:])
    assert (logits - source(tokens)).abs().max() > 0  # there are updates


def test_a_checkpoint_is_a_source_and_the_source_is_left_alone(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    corpus = load_corpus([str(path)], window=32)
    trainer = Trainer(RunConfig(model=CONFIG, train=TRAIN), corpus, tmp_path / "run")
    trainer.run(progress=False)
    model = from_transformer(tmp_path / "run", CmsConfig((4, 8), updates=False))
    tokens = text(1, 30)
    before = trainer.model(tokens)
    assert torch.equal(model(tokens), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(trainer.model(tokens), before)


@pytest.mark.parametrize("updates", [False, True])
def test_new_levels_learn(source, updates):
    model = from_transformer(source, CmsConfig((4, 8), updates=updates)).train()
    optimizer = make_optimizer(model, replace(TRAIN, weight_decay=0.0))
    tokens = text(2, 33)
    curve = []
    for _ in range(20):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert curve[-1] < 0.7 * curve[0]
    for block in model.blocks:
        assert block.cms.levels[1].mlp.down.weight.abs().max() > 0.01
        if updates:
            assert block.cms.target.weight.abs().max() > 0.01


def test_every_level_is_as_wide_as_the_mlp(source):
    model = from_transformer(source, CmsConfig((4, 8, 16)))
    assert model.config.mlp_dims == (CONFIG.mlp_dim,) * 3
    nested = from_transformer(source, CmsConfig((4, 8, 16), variant="nested"))
    assert nested.config.mlp_dims == (CONFIG.mlp_dim,)
    with torch.device("meta"):  # the preset that is made for it
        big = LanguageModel(preset("tiny-gelu").model)
        assert from_transformer(big, CmsConfig((4, 8))).config.mlp_dims == (600, 600)


def test_what_a_level_cannot_begin_as_is_refused(source):
    with pytest.raises(HopeError, match=r"source must have model.mlp 'gelu', .* not 'swiglu'"):
        from_transformer(LanguageModel(replace(CONFIG, mlp="swiglu")), CmsConfig((4,)))
    with pytest.raises(HopeError, match=r"source must have model.mlp 'gelu', .* not a CMS"):
        from_transformer(from_transformer(source, CmsConfig((4,))), CmsConfig((4,)))
    with pytest.raises(HopeError, match=r"cms.activation must be 'gelu', .* not 'silu'"):
        from_transformer(source, CmsConfig((4,), activation="silu"))
