"""Named starting points for `hope train --preset`."""

from dataclasses import replace

from hope.config import (
    AttentionConfig,
    CmsConfig,
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


# A 32nd of the paper's 512 to 32,768: two of four levels move within a training sequence. CUDA's
# kernels want MLPs whose widths are multiples of 16, so models with it have such.
_TINY_CMS = CmsConfig(chunk_sizes=(16, 64, 256, 1024))


def _tiny(
    name: str,
    mlp_ratio: float,
    mixer: MixerConfig,
    *,
    mlp: str = "swiglu",
    cms: CmsConfig | None = None,
) -> RunConfig:
    """`tiny` with another mixer, or MLP, and a width of the MLP that makes the size equal."""
    model = replace(_TINY.model, mlp_ratio=mlp_ratio, mixer=mixer, mlp=mlp, cms=cms)
    return replace(_TINY, preset=name, model=model)


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
    # 3 d^2 in the projections, 512 d in the memories, 8 d^2 in the four levels of a continuum
    # memory system, as in an MLP, and d^2 in its target.
    mixer = HopeConfig(heads=dim // 64, head_dim=64, chunk_size=64)
    return ModelConfig(dim=dim, layers=layers, mlp_ratio=4.0, mixer=mixer, cms=CmsConfig())


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
        _tiny("tiny-gelu", 4.6875, AttentionConfig(heads=4, head_dim=32), mlp="gelu"),
        _tiny("hope-tiny", 2.8125, HopeConfig(heads=4, head_dim=32)),
        _tiny("hope-tiny-cms", 3.5, HopeConfig(heads=4, head_dim=32), cms=_TINY_CMS),
        _tiny("hope-attention-tiny", 4.0, AttentionConfig(heads=4, head_dim=32), cms=_TINY_CMS),
        _large("125m", _titans(768, 16), lr=1.5e-3, tokens=2_500_000_000, batch=64),
        _large("340m", _titans(1024, 25), lr=1e-3, tokens=7_000_000_000, batch=128),
        _large("760m", _titans(1536, 25), lr=7e-4, tokens=15_000_000_000, batch=128),
        _large("1.3b", _titans(2048, 24), lr=5e-4, tokens=30_000_000_000, batch=256),
        _large("hope-340m", _hope(1024, 23), lr=1e-3, tokens=7_000_000_000, batch=128),
        _large("hope-760m", _hope(1536, 24), lr=7e-4, tokens=15_000_000_000, batch=128),
        _large("hope-1.3b", _hope(2048, 24), lr=5e-4, tokens=30_000_000_000, batch=256),
    )
}


def preset(name: str) -> RunConfig:
    """The preset called `name`; HopeError lists the known ones."""
    if name not in PRESETS:
        raise HopeError(f"unknown preset {name!r}; there are: {', '.join(PRESETS)}")
    return PRESETS[name]


# The vocabulary of the paper's models, with which the HOPE presets have the size of their names.
_FULL_VOCABULARY = 32_000


def full_hope_parameter_count(config: ModelConfig) -> int:
    """Number of parameters of a HOPE preset's model with a vocabulary of 32,000 instead of bytes.

    The head is tied: the vocabulary counts once.
    """
    return parameter_count(replace(config, vocab_size=_FULL_VOCABULARY))
