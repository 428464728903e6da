"""Softmax attention over the whole text, and what all attention shares."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import register_dataclass

from hope.config import AttentionConfig
from hope.layers.conv import CausalConv


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


def document_positions(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The document [T] of every packed token, and its position [T] there."""
    starts = cu_seqlens.long()
    index = torch.arange(tokens, device=cu_seqlens.device)
    document = torch.searchsorted(starts, index, right=True) - 1
    return document, index - starts[document]


def rotate_half(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """The first half of the dimensions of x [..., T, D] turned by `rotate`; the rest as it is."""
    turned, rest = x.chunk(2, dim=-1)
    return torch.cat((rotate(turned, positions, base), rest), dim=-1)


class Persistent(nn.Module):
    """P learned keys and values per head that every token sees: what the task, not a text, teaches.

    They are keys and values themselves, not tokens: so they cost two small tensors and no
    projection. Their keys are zero in the dimensions that `rotate_half` turns: they stand at no
    position, and a token's distance from the start of its text, block or segment changes nothing.
    The memory's share of them in Titans (section 3.3) is its learned initial weights.
    """

    def __init__(self, heads: int, head_dim: int, count: int) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.empty(heads, count, head_dim // 2))
        self.values = nn.Parameter(torch.empty(heads, count, head_dim))

    def init_weights(self) -> None:
        """Keys as long as a token's; values of zero, so that they begin as a place to look away."""
        nn.init.normal_(self.keys)
        nn.init.zeros_(self.values)

    def prepend(self, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k, v [..., H, K, D] and mask [..., Q, K] (True: visible), with P more in front of K."""
        count = self.keys.shape[1]
        keys = F.pad(self.keys, (k.shape[-1] - self.keys.shape[-1], 0)).to(k.dtype)
        k = torch.cat((keys.expand(*k.shape[:-3], -1, -1, -1), k), dim=-2)
        values = self.values.to(v.dtype)
        v = torch.cat((values.expand(*v.shape[:-3], -1, -1, -1), v), dim=-2)
        return k, v, F.pad(mask, (count, 0), value=True)
