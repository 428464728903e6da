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
from hope.layers.spectral import limited
from hope.layers.unit import unit

_NAMES = [field.name for field in fields(hope_ext.SelfModifyingWeights)]
_GATES = ("lr", "retention")
# The length of what the memories learn from. What a memory m is told to answer to a key k, of
# length 1, is its own answer to the value v = M_v(x): what it adds to k becomes v - k and what it
# adds to v. Such learning from one's own predictions ends where v, their discount, is shorter than
# k. Values are about as long as x at the start, and may become four times as long.
_INPUT_LENGTH = 1 / 8
# |k W1| at the start. W2 learns k with |act(k W1)|^2, 7 to 10, times the rate, while the delta rule
# takes k out of W1 with the rate alone: what is learned is in W2 long before W1 is worn away.
_FIRST = 5.0
# The largest spectral norms that second layers start with; those of gates move logits by more.
_SECOND, _SECOND_OF_GATE = 0.3, 4.0
# Where the gates start. A token takes rate / D of what W1 holds of random keys, with nothing to
# put it back: a rate of at most D / 8,192, and half-lives in tokens and in chunks at least.
_WEAR = 8_192
_HALF_LIFE, _HALF_LIFE_IN_CHUNKS = 16_384, 1_000


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
    rewrite themselves. In every head queries have length 1 and inputs 1/8; every head's output is
    normalised and gated as that of TitansMemory.
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
                        torch.empty(heads, hidden, 1 if name in _GATES else size),
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

        Memories start near the identity (those of the gates near 0), rates at no more than half of
        what they may be, and the output's gate near 1.
        """
        self.conv.init_weights()
        for first, second in self.memories.values():
            nn.init.normal_(first, std=_FIRST * first.shape[-1] ** -0.5)
            nn.init.normal_(second, std=0.02)
        nn.init.zeros_(self.gate.bias)
        config = self.config
        share = min(0.5, config.head_dim / _WEAR / (config.lr_max / config.chunk_size))
        nn.init.constant_(self.lr_bias, math.log(share / (1 - share)))
        half_life = max(_HALF_LIFE, _HALF_LIFE_IN_CHUNKS * config.chunk_size)
        logit = -math.log(math.expm1(math.log(2) / half_life))  # of 2^(-1 / half_life)
        nn.init.constant_(self.retention_bias, logit)

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
            _INPUT_LENGTH * inputs,
            q,
            self.start() if state is None else self._unlimited(),  # a state has taken their place
            self.lr_bias,
            self.retention_bias,
            state=None if state is None else state.memory,
            chunk_size=config.chunk_size,
            lr_max=config.lr_max / config.chunk_size,
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
        """The memories at the start of a text, matrices [H, ., .].

        Their spectral norms are limited, whatever the outer loop learns. A value is then no longer
        than |M(x)| <= |x| (1 + |W1| |W2|) <= 1/2, and a step on W1, which takes up to
        lr_max |W2|^2 of an error in a chunk, no longer than the error.
        """
        first = _FIRST * (1 + self.config.expansion**-0.5)  # that of W1 as it is drawn
        return hope_ext.SelfModifyingWeights(
            **{
                name: (
                    limited(w1, first),
                    limited(w2, _SECOND_OF_GATE if name in _GATES else _SECOND),
                )
                for name, (w1, w2) in self.memories.items()
            }
        )

    def _unlimited(self) -> hope_ext.SelfModifyingWeights:
        return hope_ext.SelfModifyingWeights(**{n: tuple(w) for n, w in self.memories.items()})
