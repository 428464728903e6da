"""Named starting points for `hope train --preset`."""

from dataclasses import replace

from hope.config import (
    AttentionConfig,
    HopeConfig,
    MacConfig,
    MagConfig,
    MalConfig,
    MixerConfig,
    ModelConfig,
    RunConfig,
    TitansConfig,
    TrainConfig,
)
from hope.errors import HopeError
from hope.model import parameter_count

# A width-d block holds about 13 d^2 parameters: 4 d^2 in the mixer (q, k, v, output), 9 d^2 in the
# MLP. Attention and memory blocks differ by little more than the memories. Mixers with a memory and
# attention have 7 d^2 (two times q, k, v), deep memories another 8 * head_dim * d.
_MLP_RATIO = 3.0
_TINY = RunConfig(
    preset="tiny",
    model=ModelConfig(
        dim=128, layers=4, mlp_ratio=_MLP_RATIO, mixer=TitansConfig(heads=4, head_dim=32)
    ),
    train=TrainConfig(),
)
_TINY_TRANSFORMER = replace(
    _TINY,
    preset="tiny-transformer",
    # A wider MLP makes up for the memories and rates.
    model=replace(_TINY.model, mlp_ratio=3.125, mixer=AttentionConfig(heads=4, head_dim=32)),
)
_TINY_CONV_ATTENTION = replace(
    _TINY_TRANSFORMER,
    preset="tiny-conv-attention",
    model=replace(
        _TINY_TRANSFORMER.model, mixer=AttentionConfig(heads=4, head_dim=32, conv_width=4)
    ),
)


def _tiny(name: str, mlp_ratio: float, mixer: MixerConfig) -> RunConfig:
    """`tiny` with another mixer, whose weights a narrower MLP makes up for."""
    return replace(_TINY, preset=name, model=replace(_TINY.model, mlp_ratio=mlp_ratio, mixer=mixer))


# Windows and segments of a quarter of the training sequence: the memory has something to do.
_WINDOW = _TINY.train.sequence // 4


def _large(
    name: str, model: ModelConfig, *, lr: float, tokens: int, batch: int, sequence: int = 2048
) -> RunConfig:
    train = TrainConfig(
        tokens=tokens,
        batch=batch,
        sequence=sequence,
        lr=lr,
        lr_final=0.1,
        warmup=0.02,
        validate_every=1000,
        validation_tokens=1_048_576,
        checkpoint_every=1000,
        dtype="bfloat16",
    )
    return RunConfig(preset=name, model=model, train=train)


def _titans(dim: int, layers: int) -> ModelConfig:
    # Linear memories: the cheapest ones, on which these sizes can be trained first.
    mixer = TitansConfig(heads=dim // 64, head_dim=64, chunk_size=64)
    return ModelConfig(dim=dim, layers=layers, mlp_ratio=_MLP_RATIO, mixer=mixer)


def _hope(dim: int, layers: int) -> ModelConfig:
    # 3 d^2 in the projections, 512 d in the memories, and 8 d^2 in an MLP that is as large as the
    # Continuum Memory System that belongs in its place.
    mixer = HopeConfig(heads=dim // 64, head_dim=64, chunk_size=64)
    return ModelConfig(dim=dim, layers=layers, mlp_ratio=8 / 3, mixer=mixer)


PRESETS: dict[str, RunConfig] = {
    run.preset: run
    for run in (
        _TINY,
        _TINY_TRANSFORMER,
        _TINY_CONV_ATTENTION,
        _tiny("tiny-deep", 2.4375, TitansConfig(heads=4, head_dim=32, memory="deep")),
        _tiny("tiny-mac", 2.0, MacConfig(heads=4, head_dim=32, segment=_WINDOW)),
        _tiny("tiny-mag", 2.0, MagConfig(heads=4, head_dim=32, window=_WINDOW)),
        _tiny("tiny-mal", 2.0, MalConfig(heads=4, head_dim=32, window=_WINDOW)),
        _tiny("hope-tiny", 2.8125, HopeConfig(heads=4, head_dim=32)),
        _large("125m", _titans(768, 16), lr=1.5e-3, tokens=2_500_000_000, batch=64),
        _large("340m", _titans(1024, 25), lr=1e-3, tokens=7_000_000_000, batch=128),
        _large("760m", _titans(1536, 25), lr=7e-4, tokens=15_000_000_000, batch=128),
        _large("1.3b", _titans(2048, 24), lr=5e-4, tokens=30_000_000_000, batch=256),
        _large("hope-340m", _hope(1024, 25), lr=1e-3, tokens=7_000_000_000, batch=128),
        _large("hope-760m", _hope(1536, 27), lr=7e-4, tokens=15_000_000_000, batch=128),
        _large("hope-1.3b", _hope(2048, 26), lr=5e-4, tokens=30_000_000_000, batch=256),
    )
}


def preset(name: str) -> RunConfig:
    """The preset called `name`; HopeError lists the known ones."""
    if name not in PRESETS:
        raise HopeError(f"unknown preset {name!r}; there are: {', '.join(PRESETS)}")
    return PRESETS[name]


# What makes a HOPE preset's name true: the vocabulary and the levels of the paper's models.
_FULL_VOCABULARY = 32_000
_CMS_LEVELS = 4


def full_hope_parameter_count(config: ModelConfig) -> int:
    """Number of parameters of the full HOPE that a HOPE preset's model is made for.

    `config` with a vocabulary of 32,000 (tied head) instead of bytes and, in the place of every
    MLP, a Continuum Memory System of four levels that share an MLP's 8 d^2: each is two matrices
    [dim, F] and [F, dim], F = 4 dim / 4 rounded to a multiple of 64.
    """
    mlp = 3 * config.dim * config.mlp_dim
    level = 2 * config.dim * round(4 * config.dim / _CMS_LEVELS / 64) * 64
    model = parameter_count(replace(config, vocab_size=_FULL_VOCABULARY))
    return model + config.layers * (_CMS_LEVELS * level - mlp)
