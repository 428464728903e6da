"""Language models whose memories learn while they read: layers, models, training, generation."""

from hope.checkpoint import load_config, load_model
from hope.config import (
    AttentionConfig,
    CmsConfig,
    DataConfig,
    HopeConfig,
    MacConfig,
    MagConfig,
    MalConfig,
    ModelConfig,
    RunConfig,
    TitansConfig,
    TrainConfig,
)
from hope.data import Corpus, load_corpus
from hope.errors import HopeError
from hope.generate import decode, generate
from hope.layers import (
    MLP,
    Attention,
    CausalConv,
    ContinuumMemory,
    MemoryAsContext,
    MemoryAsGate,
    MemoryAsLayer,
    SelfModifyingMemory,
    SwiGLU,
    TitansMemory,
)
from hope.model import LanguageModel, ModelState, parameter_count
from hope.presets import PRESETS, preset
from hope.tokenizers import ByteTokenizer, JsonTokenizer, load_tokenizer, open_tokenizer
from hope.train import Trainer, TrainingDiverged, TrainResult

__all__ = [
    "MLP",
    "PRESETS",
    "Attention",
    "AttentionConfig",
    "ByteTokenizer",
    "CausalConv",
    "CmsConfig",
    "ContinuumMemory",
    "Corpus",
    "DataConfig",
    "HopeConfig",
    "HopeError",
    "JsonTokenizer",
    "LanguageModel",
    "MacConfig",
    "MagConfig",
    "MalConfig",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryAsLayer",
    "ModelConfig",
    "ModelState",
    "RunConfig",
    "SelfModifyingMemory",
    "SwiGLU",
    "TitansConfig",
    "TitansMemory",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "TrainingDiverged",
    "decode",
    "generate",
    "load_config",
    "load_corpus",
    "load_model",
    "load_tokenizer",
    "open_tokenizer",
    "parameter_count",
    "preset",
]
