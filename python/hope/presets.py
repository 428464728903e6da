"""Named starting points for `hope train --preset`."""

from dataclasses import replace

from hope.config import (
    AttentionConfig,
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


def _titans(name: str, dim: int, layers: int, lr: float, tokens: int, batch: int) -> RunConfig:
    # Linear memories: the cheapest ones, on which these sizes can be trained first.
    mixer = TitansConfig(heads=dim // 64, head_dim=64, chunk_size=64)
    train = TrainConfig(
        tokens=tokens,
        batch=batch,
        sequence=2048,
        lr=lr,
        lr_final=0.1,
        warmup=0.02,
        validate_every=1000,
        validation_tokens=1_048_576,
        checkpoint_every=1000,
        dtype="bfloat16",
    )
    model = ModelConfig(dim=dim, layers=layers, mlp_ratio=_MLP_RATIO, mixer=mixer)
    return RunConfig(preset=name, model=model, train=train)


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
        _titans("125m", dim=768, layers=16, lr=1.5e-3, tokens=2_500_000_000, batch=64),
        _titans("340m", dim=1024, layers=25, lr=1e-3, tokens=7_000_000_000, batch=128),
        _titans("760m", dim=1536, layers=25, lr=7e-4, tokens=15_000_000_000, batch=128),
        _titans("1.3b", dim=2048, layers=24, lr=5e-4, tokens=30_000_000_000, batch=256),
    )
}


def preset(name: str) -> RunConfig:
    """The preset called `name`; HopeError lists the known ones."""
    if name not in PRESETS:
        raise HopeError(f"unknown preset {name!r}; there are: {', '.join(PRESETS)}")
    return PRESETS[name]
