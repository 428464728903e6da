"""The layers of a model: token mixers, and the MLP or continuum memory system between them.

A *mixer* is a module `forward(x, state=None, cu_seqlens=None) -> (y, state)` that moves
information between tokens: x and y are [B, T, dim]; `state` is what it carries from one call to
the next (None at the start of a text), a pytree-registered dataclass with `detach()`; `cu_seqlens`
(int32 [N + 1], B = 1) marks packed documents, each of which starts anew. For the model's
initialisation it has `init_weights()`, for what is special in it, and `out`, the linear layer that
writes into the residual stream. `MIXERS` maps a mixer's config class to its module.

Shapes: B batch, T tokens, H heads, D head_dim, C channels, K convolution width, N packed documents.
"""

from torch import nn

from hope.config import (
    AttentionConfig,
    HopeConfig,
    MacConfig,
    MagConfig,
    MalConfig,
    MixerConfig,
    TitansConfig,
)
from hope.layers.attention import Attention, AttentionState
from hope.layers.cms import CmsStates, ContinuumMemory
from hope.layers.conv import CausalConv
from hope.layers.mac import MacState, MemoryAsContext
from hope.layers.mag import MagState, MemoryAsGate
from hope.layers.mal import MemoryAsLayer
from hope.layers.memory import TitansMemory, TitansMemoryState
from hope.layers.mlp import MLP, SwiGLU, make_mlp
from hope.layers.selfmod import SelfModifyingMemory, SelfModifyingMemoryState

__all__ = [
    "MIXERS",
    "MLP",
    "Attention",
    "AttentionState",
    "CausalConv",
    "CmsStates",
    "ContinuumMemory",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryAsLayer",
    "MixerState",
    "SelfModifyingMemory",
    "SwiGLU",
    "TitansMemory",
    "make_mlp",
]

MixerState = TitansMemoryState | AttentionState | MacState | MagState | SelfModifyingMemoryState
MIXERS: dict[type[MixerConfig], type[nn.Module]] = {
    TitansConfig: TitansMemory,
    AttentionConfig: Attention,
    MacConfig: MemoryAsContext,
    MagConfig: MemoryAsGate,
    MalConfig: MemoryAsLayer,
    HopeConfig: SelfModifyingMemory,
}
