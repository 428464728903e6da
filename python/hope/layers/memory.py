"""The Titans memory as a token mixer, and as a part of others."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import register_dataclass

import hope_ext
from hope.config import TitansConfig
from hope.layers.conv import CausalConv
from hope.layers.mlp import ACTIVATIONS
from hope.layers.unit import unit, unit_qk

_NORM_EPS = 1e-6


@dataclass
class TitansMemoryState:
    """What TitansMemory carries: the convolution's last inputs [B, K - 1, C] and the memory."""

    conv: Tensor
    memory: hope_ext.TitansState

    def detach(self) -> "TitansMemoryState":
        return TitansMemoryState(self.conv.detach(), self.memory.detach())


register_dataclass(TitansMemoryState)


class NeuralMemory(nn.Module):
    """`hope_ext.titans_memory` with all its inputs projected from x [B, T, dim]; y [B, T, H * D].

    q, k and v pass a short causal convolution and SiLU; q and k have length 1. The inner learning
    rate, momentum, decay and the output's gate are functions of the token for every head (in
    float32). Every head's output is normalised and gated. (A gate per channel would cost another
    projection.)
    """

    def __init__(self, dim: int, config: TitansConfig) -> None:
        super().__init__()
        self.config = config
        heads, head_dim = config.heads, config.head_dim
        self.width = heads * head_dim
        self.qkv = nn.Linear(dim, 3 * self.width, bias=False)
        self.conv = CausalConv(3 * self.width, config.conv_width, activation="silu")
        # Inner learning rate, momentum, decay and output gate, before their sigmoids.
        self.rates = nn.Linear(dim, 4 * heads)
        sizes = [head_dim, head_dim]
        if config.memory == "deep":
            sizes.insert(1, config.expansion * head_dim)
        # (W,) or (W1, W2), each [H, ., .]: where the memory starts on every text.
        self.memory = nn.ParameterList(
            torch.empty(heads, *pair) for pair in itertools.pairwise(sizes)
        )
        if config.norm == "layer":
            self.norm_weight = nn.Parameter(torch.empty(heads, head_dim))
            self.norm_bias = nn.Parameter(torch.empty(heads, head_dim))

    def init_weights(self) -> None:
        """Initial values of what is special here; `hope.model` initialises the linear layers.

        A linear memory starts with entries of standard deviation 0.25 / sqrt(D), where a unit key
        reads a value of length 0.25: about where untrained layers take it on long texts, so that
        its norm stays within a small factor of the start's. A deep one starts near the identity.
        With a LayerNorm the length of what it adds is in the norm's weight: 1, like the key's, and
        so is the core's, because the norm divides the inner gradient by it.
        """
        config = self.config
        normed = config.norm == "layer"
        first = 1.0 if normed or config.memory == "deep" else 0.25
        nn.init.normal_(self.memory[0], std=first * config.head_dim**-0.5)
        if config.memory == "deep":
            # |act(k W1)|^2 is about F / (4 D) for a unit key: act(z) is about z / 2 near 0.
            second = (config.expansion / 4 * config.head_dim) ** -0.5 if normed else 0.02
            nn.init.normal_(self.memory[1], std=second)
        if normed:
            nn.init.constant_(self.norm_weight, config.head_dim**-0.5)
            nn.init.zeros_(self.norm_bias)
        self.conv.init_weights()
        ends = map(math.log2, config.half_lives)
        half_lives = torch.logspace(*ends, config.heads, base=2.0)
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
        if config.memory == "deep" or config.norm == "layer":
            v = unit(v)  # larger ones would take the inner loop out of its stable range: see _gain
        lr, momentum, decay, gate = self._rates(x)
        o, memory = hope_ext.titans_memory(
            q,
            k,
            v,
            lr,
            tuple(self.memory),
            momentum,
            decay,
            state=None if state is None else state.memory,
            chunk_size=config.chunk_size,
            activation=config.activation,
            objective=config.objective,
            read=config.read,
            cu_seqlens=cu_seqlens,
            return_state=True,
            **self._norm(),
        )
        # RMSNorm without a weight: the next layer has one for each of its inputs. The gate begins
        # near 1.
        o = unit(o, config.head_dim**0.5) * (2 * gate)[..., None].to(o.dtype)
        return o.flatten(2), TitansMemoryState(tail, memory)

    def start(self, batch: int) -> tuple[Tensor, ...]:
        """The memory's weights at the start of `batch` texts, each [B, H, ., .]."""
        return tuple(w.expand(batch, *w.shape) for w in self.memory)

    def retrieve(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """What a memory with these weights [B, H, ., .] answers to x [B, T, dim]; [B, T, H * D].

        Nothing is learned. The queries have the memory's projection, and no convolution: they are
        of single tokens.
        """
        config = self.config
        q = F.silu(F.linear(x, self.qkv.weight[: self.width]))
        q = unit(q.unflatten(-1, (config.heads, config.head_dim))).transpose(1, 2)  # [B, H, T, D]
        o = q.to(weights[0].dtype) @ weights[0]
        if config.memory == "deep":
            o = ACTIVATIONS[config.activation](o) @ weights[1]
        if config.norm == "layer":
            o = F.layer_norm(o, o.shape[-1:], eps=_NORM_EPS)
            o = o * self.norm_weight[:, None] + self.norm_bias[:, None]
        if config.memory == "deep" or config.norm == "layer":
            o = q + o
        return unit(o, config.head_dim**0.5).transpose(1, 2).flatten(2).to(x.dtype)

    def _norm(self) -> dict[str, Any]:
        """The operator's arguments for a LayerNorm in the memory."""
        if self.config.norm == "none":
            return {}
        weights = {"norm_weight": self.norm_weight, "norm_bias": self.norm_bias}
        return {"norm": self.config.norm, "norm_eps": _NORM_EPS, **weights}

    def _gain(self) -> float:
        """About how much of the error in the answer to a unit key a step of rate 1 takes away.

        A linear memory: all of it, times |k|^2 = 1. A deep one: the step on W2 takes |h|^2 times
        the error, h = act(k W1), which starts at about F / (4 D); the step on W1 takes what is left
        of the error after W2^T, act' and W2: about 1 once W2 holds values of length 1 (with a
        LayerNorm from the start). The rates are divided by the sum, so that lr_max and the bound on
        it mean the same for all memories. That needs values of a bounded length: a deep memory's
        curvature grows with what it holds.
        """
        config = self.config
        return 1.0 if config.memory == "linear" else config.expansion / 4 + 1

    def _rates(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """lr, momentum (None without), decay and gate of tokens and heads, [B, T, H] float32."""
        config = self.config
        # The bias is added in float32: beside a decay gate's bias of -8, bfloat16 would round the
        # token's part away.
        logits = F.linear(x, self.rates.weight).float() + self.rates.bias
        lr, momentum, decay, gate = logits.sigmoid().chunk(4, dim=-1)
        scale = config.lr_max / config.chunk_size / self._gain()
        if config.momentum_max == 0:
            return scale * lr, None, decay, gate
        momentum = config.momentum_max * momentum
        return scale * lr * (1 - momentum), momentum, decay, gate


class TitansMemory(NeuralMemory):
    """The Titans memory as a mixer of its own (Titans, section 4.4: LMM): projected back to dim."""

    def __init__(self, dim: int, config: TitansConfig) -> None:
        super().__init__(dim, config)
        self.out = nn.Linear(self.width, dim, bias=False)

    def forward(
        self, x: Tensor, state: TitansMemoryState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, TitansMemoryState]:
        o, state = super().forward(x, state, cu_seqlens)
        return self.out(o), state
