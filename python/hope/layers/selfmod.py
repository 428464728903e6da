"""HOPE's self-modifying memory as a token mixer (Nested Learning, arXiv 2512.24695, section 8)."""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import register_dataclass

import hope_ext
from hope.config import HopeConfig
from hope.layers.conv import CausalConv
from hope.layers.unit import unit

_NAMES = [field.name for field in fields(hope_ext.SelfModifyingWeights)]
# The gates of `lr` and `retention` start from the outputs that these logits stand for: a token's
# inner learning rate of 0.0067, and a half-life of 113,000 tokens. From there a memory keeps its
# norm; near logits of 0 it diverges within a few chunks.
_LR_START = -5.0
_RETENTION_START = 12.0


@dataclass
class SelfModifyingMemoryState:
    """What SelfModifyingMemory carries: the convolution's last inputs [B, K - 1, C], the memories.

    C is 2 H D: queries and inputs.
    """

    conv: Tensor
    memory: hope_ext.SelfModifyingState

    def detach(self) -> "SelfModifyingMemoryState":
        return SelfModifyingMemoryState(self.conv.detach(), self.memory.detach())


register_dataclass(SelfModifyingMemoryState)


class SelfModifyingMemory(nn.Module):
    """`hope_ext.self_modifying_memory` of projected queries and inputs; x and y [B, T, dim].

    Only the two projections, their short convolution with SiLU, and the output's gate are fixed
    while a text is read. Keys, values, inner learning rates and retentions come from memories that
    rewrite themselves. Queries and inputs have length 1 in every head, or the inner loop would not
    be stable; every head's output is normalised and gated as that of TitansMemory.
    """

    def __init__(self, dim: int, config: HopeConfig) -> None:
        super().__init__()
        self.config = config
        heads, size, hidden = config.heads, config.head_dim, config.expansion * config.head_dim
        width = heads * size
        self.qx = nn.Linear(dim, 2 * width, bias=False)
        self.conv = CausalConv(2 * width, config.conv_width, activation="silu")
        self.gate = nn.Linear(dim, heads)
        # (W1 [H, D, F], W2 [H, F, D or 1]) of each memory: where it starts on every text.
        self.memories = nn.ModuleDict(
            {
                name: nn.ParameterList(
                    (
                        torch.empty(heads, size, hidden),
                        torch.empty(heads, hidden, 1 if name in ("lr", "retention") else size),
                    )
                )
                for name in _NAMES
            }
        )
        self.lr_bias = nn.Parameter(torch.empty(heads))
        self.retention_bias = nn.Parameter(torch.empty(heads))
        self.out = nn.Linear(width, dim, bias=False)

    def init_weights(self) -> None:
        """Initial values of what is special here; `hope.model` initialises the linear layers.

        Memories start near the identity (those of the gates near 0), and the gate near 1.
        """
        self.conv.init_weights()
        for first, second in self.memories.values():
            nn.init.normal_(first, std=self.config.head_dim**-0.5)
            nn.init.normal_(second, std=0.02)
        nn.init.zeros_(self.gate.bias)
        # The rate is the one that the logit _LR_START gives where it is bounded by 1.
        start = 1 / (1 + math.exp(-_LR_START)) / self.lr_max
        nn.init.constant_(self.lr_bias, math.log(start / (1 - start)))
        nn.init.constant_(self.retention_bias, _RETENTION_START)

    @property
    def lr_max(self) -> float:
        """The most that a token's inner learning rate can be.

        A chunk's gradients are all taken at its start and add up. Each takes |act(k W1)|^2 of the
        error in the answer to a unit key away through W2, about expansion / 4 at the start, and
        about 1 through W1 once W2 holds values of length 1: as in a deep TitansMemory.
        """
        config = self.config
        return config.lr_max / config.chunk_size / (1 + config.expansion / 4)

    def forward(
        self,
        x: Tensor,
        state: SelfModifyingMemoryState | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, SelfModifyingMemoryState]:
        config = self.config
        qx, tail = self.conv(self.qx(x), None if state is None else state.conv, cu_seqlens)
        q, inputs = unit(qx.unflatten(-1, (2, config.heads, config.head_dim))).unbind(2)
        o, memory = hope_ext.self_modifying_memory(
            inputs,
            q,
            self.start(),
            self.lr_bias,
            self.retention_bias,
            state=None if state is None else state.memory,
            chunk_size=config.chunk_size,
            lr_max=self.lr_max,
            activation=config.activation,
            objective=config.objective,
            read=config.read,
            cu_seqlens=cu_seqlens,
            return_state=True,
        )
        gate = (F.linear(x, self.gate.weight).float() + self.gate.bias).sigmoid()  # [B, T, H]
        o = unit(o, config.head_dim**0.5) * (2 * gate)[..., None].to(o.dtype)
        return self.out(o.flatten(2)), SelfModifyingMemoryState(tail, memory)

    def start(self) -> hope_ext.SelfModifyingWeights:
        """The memories at the start of a text, matrices [H, ., .]."""
        return hope_ext.SelfModifyingWeights(
            **{name: tuple(weights) for name, weights in self.memories.items()}
        )
