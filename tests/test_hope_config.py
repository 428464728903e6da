"""Configs: validation, overrides, JSON, presets."""

import json

import pytest
from hope import (
    PRESETS,
    AttentionConfig,
    CmsConfig,
    HopeConfig,
    HopeError,
    MalConfig,
    ModelConfig,
    RunConfig,
    TitansConfig,
    TrainConfig,
    parameter_count,
    preset,
)
from hope.config import from_dict, override, to_dict
from hope.presets import full_hope_parameter_count


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    config = preset(name)
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_missing_fields_take_their_defaults():
    assert from_dict(RunConfig, {"model": {"dim": 96}}).model == ModelConfig(dim=96)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"model": {"width": 3}}, "unknown field model.width; there are: mixer, vocab_size, dim"),
        ({"model": {"dim": "wide"}}, "model.dim must be of type int, not 'wide'"),
        ({"model": {"dim": True}}, "model.dim must be of type int, not True"),
        ({"model": {"dim": 0}}, "model.dim must be at least 1, not 0"),
        ({"model": {"mixer": {"heads": 2}}}, "model.mixer.kind must be one of titans, attention"),
        (
            {"model": {"mixer": "mamba"}},
            "must be one of titans, attention, mac, mag, mal, hope, not 'mamba'",
        ),
        (
            {"model": {"mixer": {"kind": "titans", "lr_max": 3}}},
            r"model.mixer.lr_max must be in \(0",
        ),
        (
            {"model": {"mixer": {"kind": "titans", "memory": "shallow"}}},
            "model.mixer.memory must be 'linear' or 'deep', not 'shallow'",
        ),
        (
            {"model": {"mixer": {"kind": "titans", "expansion": 0}}},
            "model.mixer.expansion must be at least 1, not 0",
        ),
        (
            {"model": {"mixer": {"kind": "titans", "activation": "relu"}}},
            "model.mixer.activation must be 'gelu' or 'silu', not 'relu'",
        ),
        (
            {"model": {"mixer": {"kind": "titans", "norm": "rms"}}},
            "model.mixer.norm must be 'none' or 'layer', not 'rms'",
        ),
        (
            {"model": {"mixer": {"kind": "titans", "read": "never"}}},
            "model.mixer.read must be 'after', 'before' or 'chunk', not 'never'",
        ),
        (
            {"model": {"mixer": {"kind": "titans", "memory": "deep", "objective": "dot"}}},
            "model.mixer.objective must be 'l2' with a deep memory without a norm, not 'dot'",
        ),
        (
            {"model": {"mixer": {"kind": "titans", "half_life_min": 0}}},
            "model.mixer.half_life_min must be above 0, not 0",
        ),
        (
            {"model": {"mixer": {"kind": "titans", "half_life_min": 5000}}},
            r"model.mixer.half_life_max must be at least half_life_min \(5000\), not 2048",
        ),
        (
            {"model": {"mixer": {"kind": "titans", "half_life_max": "long"}}},
            "model.mixer.half_life_max must be of type float, not 'long'",
        ),
        (
            {"model": {"mixer": {"kind": "mac", "segment": 0}}},
            "model.mixer.segment must be at least 1, not 0",
        ),
        (
            {"model": {"mixer": {"kind": "mac", "window": 8}}},
            "unknown field model.mixer.window; there are: .*segment",
        ),
        (
            {"model": {"mixer": {"kind": "mag", "window": 0}}},
            "model.mixer.window must be at least 1, not 0",
        ),
        (
            {"model": {"mixer": {"kind": "mal", "persistent": -1}}},
            "model.mixer.persistent must be at least 0, not -1",
        ),
        (
            {"model": {"mixer": {"kind": "mal", "head_dim": 6}}},
            "model.mixer.head_dim must be a multiple of 4 .*, not 6",
        ),
        (
            {"model": {"mixer": {"kind": "hope", "heads": 0}}},
            "model.mixer.heads must be at least 1, not 0",
        ),
        (
            {"model": {"mixer": {"kind": "hope", "activation": "relu"}}},
            "model.mixer.activation must be 'gelu' or 'silu', not 'relu'",
        ),
        (
            {"model": {"mixer": {"kind": "hope", "lr_max": 0.5}}},
            r"model.mixer.lr_max must be in \(0, 0.2\], .* stable, not 0.5",
        ),
        (
            {"model": {"mixer": {"kind": "hope", "objective": "dot"}}},
            "model.mixer.objective must be 'l2', not 'dot'",
        ),
        (
            {"model": {"mixer": {"kind": "hope", "read": "never"}}},
            "model.mixer.read must be 'after', 'before' or 'chunk', not 'never'",
        ),
        (
            {"model": {"mlp": "relu"}},
            "model.mlp must be 'swiglu' or 'gelu', not 'relu'",
        ),
        (
            {"model": {"cms": {"chunk_sizes": [8, 4]}}},
            r"model.cms.chunk_sizes must be .* none falling, not \(8, 4\)",
        ),
        (
            {"model": {"cms": {"chunk_sizes": [8.5]}}},
            r"model.cms.chunk_sizes must be a list of integers, not \[8.5\]",
        ),
        (
            {"model": {"cms": {"levels": 3}}},
            "unknown field model.cms.levels; there are: chunk_sizes, updates",
        ),
        ({"model": {"cms": "large"}}, "model.cms must be an object with fields, not 'large'"),
        ({"train": {"schedule": "flat"}}, "train.schedule must be 'cosine', 'linear' or 'wsd'"),
        ({"train": 3}, "train must be an object with fields, not 3"),
        ({"data": "text"}, "data must be a list of strings"),
    ],
)
def test_wrong_fields_are_named(data, message):
    with pytest.raises(HopeError, match=message):
        from_dict(RunConfig, data)


def test_overrides():
    config = override(
        RunConfig(),
        ["model.dim=192", "train.lr=2e-3", "train.tokens=3e6", "model.mixer.read=chunk"],
    )
    assert (config.model.dim, config.train.lr, config.train.tokens) == (192, 2e-3, 3_000_000)
    assert config.model.mixer == TitansConfig(read="chunk")


def test_a_deep_memory_forgets_more_slowly_unless_it_is_told_otherwise():
    assert TitansConfig().half_lives == (32, 2048)
    assert TitansConfig(memory="deep").half_lives == (4096, 65536)
    config = override(RunConfig(), ["model.mixer.memory=deep", "model.mixer.half_life_min=8"])
    assert config.model.mixer.half_lives == (8, 65536)
    assert override(config, ["model.mixer.half_life_min=null"]).model.mixer.half_life_min is None


def test_an_override_can_swap_the_mixer_and_then_set_its_fields():
    config = override(RunConfig(), ["model.mixer=attention", "model.mixer.conv_width=4"])
    assert config.model.mixer == AttentionConfig(conv_width=4)
    config = override(config, ["model.mixer=mal", "model.mixer.window=9"])
    assert config.model.mixer == MalConfig(window=9)


def test_an_override_can_put_a_continuum_memory_system_in_the_mlp_s_place_and_take_it_away():
    config = override(RunConfig(), ["model.cms={}", "model.cms.chunk_sizes=[8, 16]"])
    assert config.model.cms == CmsConfig(chunk_sizes=(8, 16))
    assert override(config, ["model.cms=null"]) == RunConfig()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model.dim", "looks like model.dim=192"),
        ("model.dimension=3", "no setting 'model.dimension'; there are: mixer, vocab_size, dim"),
        ("mode.dim=3", "no group of settings 'mode'"),
        ("model.dim=many", "model.dim must be of type int, not 'many'"),
        ("train.lr=-1", "train.lr must be above 0"),
    ],
)
def test_wrong_overrides_are_named(assignment, message):
    with pytest.raises(HopeError, match=message):
        override(RunConfig(), [assignment])


def test_a_budget_is_a_whole_number_of_steps():
    assert TrainConfig(tokens=3_000_000, batch=16, sequence=256).steps == 732
    assert TrainConfig(tokens=1).steps == 1


def test_the_tiny_presets_are_of_one_size():
    tiny, *others = (parameter_count(preset(name).model) for name in PRESETS if "tiny" in name)
    for other in others:
        assert abs(other / tiny - 1) < 0.03


@pytest.mark.parametrize(
    ("name", "size"), [("125m", 125e6), ("340m", 340e6), ("760m", 760e6), ("1.3b", 1.3e9)]
)
def test_the_larger_presets_have_the_size_of_their_name(name, size):
    assert abs(parameter_count(preset(name).model) / size - 1) < 0.03


@pytest.mark.parametrize(
    ("name", "size"), [("hope-340m", 340e6), ("hope-760m", 760e6), ("hope-1.3b", 1.3e9)]
)
def test_the_larger_hope_presets_have_the_full_model_s_size(name, size):
    assert abs(full_hope_parameter_count(preset(name).model) / size - 1) < 0.03


def test_the_full_hope_s_size_is_the_sum_of_its_parts():
    mixer = HopeConfig(heads=2, head_dim=64)
    model = ModelConfig(dim=128, layers=3, mlp_ratio=4.0, mixer=mixer, cms=CmsConfig())
    embedding = 32_000 * 128
    projections, convolution, gate = 3 * 128 * 128, 2 * 128 * 4, 128 * 2 + 2
    memories, biases = 2 * (3 * 2 * 64 * 64 + 2 * (64 * 64 + 64)), 2 * 2
    levels, target, rates, norms = 4 * 2 * 128 * 128, 128 * 128, 4 * (128 + 1), 5 * 128
    block = projections + convolution + gate + memories + biases + levels + target + rates + norms
    assert full_hope_parameter_count(model) == embedding + 3 * block + 128


def test_the_larger_hope_presets_have_the_paper_s_levels():
    for name in ("hope-340m", "hope-760m", "hope-1.3b"):
        model = preset(name).model
        assert model.cms.chunk_sizes == (512, 2048, 8192, 32768)
        assert model.mlp_dims == (model.dim,) * 4


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(
        HopeError, match="unknown preset 'small'; there are: tiny, tiny-transformer"
    ):
        preset("small")
