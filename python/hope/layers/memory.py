"""The Titans memory as a token mixer."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import register_dataclass

import hope_ext
from hope.config import TitansConfig
from hope.layers.conv import CausalConv
from hope.layers.unit import unit, unit_qk


@dataclass
class TitansMemoryState:
    """What TitansMemory carries: the convolution's last inputs [B, K - 1, C] and the memory."""

    conv: Tensor
    memory: hope_ext.TitansState

    def detach(self) -> "TitansMemoryState":
        return TitansMemoryState(self.conv.detach(), self.memory.detach())


register_dataclass(TitansMemoryState)


class TitansMemory(nn.Module):
    """The Titans memory as a mixer: `hope_ext.titans_memory` with all its inputs projected from x.

    q, k and v pass a short causal convolution and SiLU; q and k have length 1. The inner learning
    rate, momentum, decay and the output's gate are functions of the token for every head (in
    float32). Every head's output is normalised, gated and projected back. (A gate per channel would
    cost another projection.)
    """

    def __init__(self, dim: int, config: TitansConfig) -> None:
        super().__init__()
        self.config = config
        width = config.heads * config.head_dim
        self.qkv = nn.Linear(dim, 3 * width, bias=False)
        self.conv = CausalConv(3 * width, config.conv_width, activation="silu")
        # Inner learning rate, momentum, decay and output gate, before their sigmoids.
        self.rates = nn.Linear(dim, 4 * config.heads)
        self.memory = nn.Parameter(torch.empty(config.heads, config.head_dim, config.head_dim))
        self.out = nn.Linear(width, dim, bias=False)

    def init_weights(self) -> None:
        """Initial values of what is special here; `hope.model` initialises the linear layers.

        The memory starts with entries of standard deviation 0.25 / sqrt(D), where a unit key reads
        a value of length 0.25: about where untrained layers take it on long texts, so that its norm
        stays within a small factor of the start's.
        """
        config = self.config
        nn.init.normal_(self.memory, std=0.25 * config.head_dim**-0.5)
        self.conv.init_weights()
        half_lives = torch.logspace(
            math.log2(config.half_life_min), math.log2(config.half_life_max), config.heads, base=2.0
        )
        decay = 1 - 2 ** (-1 / half_lives)
        with torch.no_grad():
            self.rates.bias.zero_()
            self.rates.bias[2 * config.heads : 3 * config.heads] = torch.logit(decay)

    def forward(
        self, x: Tensor, state: TitansMemoryState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, TitansMemoryState]:
        config = self.config
        qkv, tail = self.conv(self.qkv(x), None if state is None else state.conv, cu_seqlens)
        qkv = qkv.unflatten(-1, (3, config.heads, config.head_dim))
        q, k, v = unit_qk(qkv)  # [B, T, H, D]
        lr, momentum, decay, gate = self._rates(x)
        o, memory = hope_ext.titans_memory(
            q,
            k,
            v,
            lr,
            (self.memory,),
            momentum,
            decay,
            state=None if state is None else state.memory,
            chunk_size=config.chunk_size,
            objective=config.objective,
            read=config.read,
            cu_seqlens=cu_seqlens,
            return_state=True,
        )
        # RMSNorm without a weight: `out` has one for each of its inputs. The gate begins near 1.
        o = unit(o, config.head_dim**0.5) * (2 * gate)[..., None].to(o.dtype)
        y = self.out(o.flatten(2))
        return y, TitansMemoryState(tail, memory)

    def _rates(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """lr, momentum (None without), decay and gate of tokens and heads, [B, T, H] float32."""
        config = self.config
        # The bias is added in float32: beside a decay gate's bias of -8, bfloat16 would round the
        # token's part away.
        logits = F.linear(x, self.rates.weight).float() + self.rates.bias
        lr, momentum, decay, gate = logits.sigmoid().chunk(4, dim=-1)
        scale = config.lr_max / config.chunk_size
        if config.momentum_max == 0:
            return scale * lr, None, decay, gate
        momentum = config.momentum_max * momentum
        return scale * lr * (1 - momentum), momentum, decay, gate
