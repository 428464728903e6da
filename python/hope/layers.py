"""The layers of a model: token mixers, the causal convolution they share, and the MLP.

A *mixer* is a module `forward(x, state=None, cu_seqlens=None) -> (y, state)` that moves
information between tokens: x and y are [B, T, dim]; `state` is what it carries from one call to
the next (None at the start of a text), a pytree-registered dataclass with `detach()`; `cu_seqlens`
(int32 [N + 1], B = 1) marks packed documents, each of which starts anew. For the model's
initialisation it has `init_weights()`, for what is special in it, and `out`, the linear layer that
writes into the residual stream. `MIXERS` maps a mixer's config class to its module.

Shapes: B batch, T tokens, H heads, D head_dim, C channels, K convolution width, N packed documents.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import register_dataclass

import hope_ext
from hope.config import AttentionConfig, MixerConfig, TitansConfig


class CausalConv(nn.Module):
    """Depthwise causal convolution over the last K tokens of each channel, then SiLU on request.

    `forward(x [B, T, C], tail=None, cu_seqlens=None)` returns the output [B, T, C] and the
    last inputs [B, K - 1, C], which a later call takes as `tail`; with `cu_seqlens` the tails' rows
    are the N documents.
    """

    def __init__(self, channels: int, width: int, activation: str = "none") -> None:
        super().__init__()
        self.activation = activation
        # [C, K]; the last tap is the token itself.
        self.weight = nn.Parameter(torch.empty(channels, width))

    def init_weights(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(
        self, x: Tensor, tail: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return hope_ext.causal_conv(
            x,
            self.weight,
            tail=None if tail is None else tail.to(x.dtype),
            activation=self.activation,
            cu_seqlens=cu_seqlens,
            return_tail=True,
        )


def document_positions(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The document [T] of every packed token, and its position [T] there."""
    starts = cu_seqlens.long()
    index = torch.arange(tokens, device=cu_seqlens.device)
    document = torch.searchsorted(starts, index, right=True) - 1
    return document, index - starts[document]


class _Unit(torch.autograd.Function):
    """y = length * x / sqrt(|x|^2 + eps) along the last dimension, in few passes over memory.

    With r = (|x|^2 + eps)^(-1/2) and u = r x: d_x = length * r (d_y - u <u, d_y>).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, length: float, eps: float) -> Tensor:
        y, scale = _scale_to(x, length, eps)
        ctx.save_for_backward(y, scale)
        ctx.length = length
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        d_x = torch.empty_like(grad)
        _scale_to_backward(grad, *ctx.saved_tensors, ctx.length, out=d_x)
        return d_x, None, None


class _UnitQK(torch.autograd.Function):
    """q, k, v of qkv [B, T, 3, H, D], q and k of length 1.

    The backward writes its parts where they belong; autograd would join them by copies.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        (q, q_scale), (k, k_scale) = (_scale_to(x, 1.0, eps) for x in qkv[:, :, :2].unbind(2))
        ctx.save_for_backward(q, q_scale, k, k_scale)
        return q, k, qkv[:, :, 2].clone()

    @staticmethod
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> tuple[Tensor, None]:
        q, q_scale, k, k_scale = ctx.saved_tensors
        batch, tokens, heads, size = q.shape
        d_qkv = q.new_empty(batch, tokens, 3, heads, size)
        _scale_to_backward(d_q, q, q_scale, 1.0, d_qkv[:, :, 0])
        _scale_to_backward(d_k, k, k_scale, 1.0, d_qkv[:, :, 1])
        d_qkv[:, :, 2] = d_v
        return d_qkv, None


def _scale_to(x: Tensor, length: float, eps: float) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale = (torch.rsqrt(norm.square() + eps) * length).to(x.dtype)
    return x * scale, scale


def _scale_to_backward(grad: Tensor, y: Tensor, scale: Tensor, length: float, out: Tensor) -> None:
    along = (y * grad).sum(-1, keepdim=True)
    out.copy_(grad).addcmul_(y, along, value=-(length**-2)).mul_(scale)


def unit(x: Tensor, length: float = 1.0, eps: float = 1e-6) -> Tensor:
    """x [..., D] scaled to `length` along the last dimension (zeros stay zeros)."""
    return _Unit.apply(x, length, eps)


def unit_qk(qkv: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, T, H, D] of qkv [B, T, 3, H, D], q and k scaled to length 1."""
    return _UnitQK.apply(qkv, eps)


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


@dataclass
class AttentionState:
    """What Attention carries: the past keys and values [B, H, tokens, D], and as above."""

    conv: Tensor | None
    keys: Tensor
    values: Tensor

    def detach(self) -> "AttentionState":
        conv = None if self.conv is None else self.conv.detach()
        return AttentionState(conv, self.keys.detach(), self.values.detach())


register_dataclass(AttentionState)


class Attention(nn.Module):
    """Causal softmax attention with rotary positions; a causal convolution on q, k, v on request.

    Its state grows with the text. A state together with `cu_seqlens` is refused: documents of
    different lengths have no common [B, H, tokens, D].
    """

    def __init__(self, dim: int, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.heads * config.head_dim
        self.qkv = nn.Linear(dim, 3 * width, bias=False)
        self.conv = CausalConv(3 * width, config.conv_width) if config.conv_width > 1 else None
        self.out = nn.Linear(width, dim, bias=False)

    def init_weights(self) -> None:
        """Initial values of what is special here; `hope.model` initialises the linear layers."""
        if self.conv is not None:
            self.conv.init_weights()

    def forward(
        self, x: Tensor, state: AttentionState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        if state is not None and cu_seqlens is not None:
            raise ValueError("attention takes a state or cu_seqlens, not both")
        config, tokens = self.config, x.shape[1]
        qkv, tail = self.qkv(x), None
        if self.conv is not None:
            qkv, tail = self.conv(qkv, None if state is None else state.conv, cu_seqlens)
        qkv = qkv.unflatten(-1, (3, config.heads, config.head_dim)).permute(2, 0, 3, 1, 4)
        past = 0 if state is None else state.keys.shape[2]
        if cu_seqlens is None:
            positions = torch.arange(past, past + tokens, device=x.device)
        else:
            document, positions = document_positions(cu_seqlens, tokens)
        q, k = rotate(qkv[:2], positions, config.rope_base)
        v = qkv[2]
        if state is not None:
            k, v = torch.cat((state.keys, k), dim=2), torch.cat((state.values, v), dim=2)
        mask = None
        if cu_seqlens is not None:
            mask = (document[:, None] == document).tril()
        elif past > 0:
            mask = torch.ones(tokens, past + tokens, dtype=torch.bool, device=x.device).tril(past)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(o.transpose(1, 2).flatten(2)), AttentionState(tail, k, v)


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Turns the pairs (x_i, x_{i + D/2}) of x [..., T, D] by position * base^(-2 i / D)."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class SwiGLU(nn.Module):
    """The MLP: `(silu(x G) * x U) D`, x [..., dim]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        # G and U are not one matrix: cutting its output costs a copy in the backward.
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


MixerState = TitansMemoryState | AttentionState
MIXERS: dict[type[MixerConfig], type[nn.Module]] = {
    TitansConfig: TitansMemory,
    AttentionConfig: Attention,
}
