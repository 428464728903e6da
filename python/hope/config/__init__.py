"""Typed, validated, immutable descriptions of a model and its training, and their JSON form.

A mixer's config names its class: `MixerConfig` lists the config classes, whose `kind` the JSON form
carries, and `hope.layers.MIXERS` maps the config class to the module. A new memory adds one entry
to each.
"""

from hope.config.form import from_dict, override, to_dict
from hope.config.learn import LearnConfig
from hope.config.mixers import (
    MIXER_KINDS,
    AttentionConfig,
    HopeConfig,
    MacConfig,
    MagConfig,
    MalConfig,
    MixerConfig,
    TitansConfig,
)
from hope.config.model import CmsConfig, ModelConfig
from hope.config.parallel import ParallelConfig
from hope.config.run import DataConfig, RunConfig, TrainConfig

__all__ = [
    "MIXER_KINDS",
    "AttentionConfig",
    "CmsConfig",
    "DataConfig",
    "HopeConfig",
    "LearnConfig",
    "MacConfig",
    "MagConfig",
    "MalConfig",
    "MixerConfig",
    "ModelConfig",
    "ParallelConfig",
    "RunConfig",
    "TitansConfig",
    "TrainConfig",
    "from_dict",
    "override",
    "to_dict",
]
