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
    """What Attention carries: the past keys and values [B, H, slots, D], and as above.

    filled: bool [B, slots], which slots hold a token of a row's text; None: all of them.
    """

    conv: Tensor | None
    keys: Tensor
    values: Tensor
    filled: Tensor | None = None

    def detach(self) -> "AttentionState":
        conv = None if self.conv is None else self.conv.detach()
        return AttentionState(conv, self.keys.detach(), self.values.detach(), self.filled)

    def compact(self) -> "AttentionState":
        """The same state without the slots that no row needs; waits for the device.

        A row's tokens go to its end, in their order.
        """
        if self.filled is None:
            return self
        counts = self.filled.sum(1)
        longest = int(counts.max()) if len(counts) > 0 else 0
        slots = self.filled.shape[1]
        order = self.filled.long().argsort(dim=1, stable=True)[:, slots - longest :]
        index = order[:, None, :, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[3])
        keys, values = self.keys.gather(2, index), self.values.gather(2, index)
        filled = None if bool((counts == longest).all()) else self.filled.gather(1, order)
        return AttentionState(self.conv, keys, values, filled)


register_dataclass(AttentionState)


class Attention(nn.Module):
    """Causal softmax attention with rotary positions; a causal convolution on q, k, v on request.

    Its state grows with the text. After packed documents its rows are the documents, and all of
    them share one tensor of keys, each with its own slots filled: `AttentionState.compact` gives
    them rows of their own.
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
        config = self.config
        texts = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
        if state is not None and len(state.keys) != texts:
            raise ValueError(
                f"state must have {texts} rows, one for each text, not {len(state.keys)}"
            )
        qkv, tail = self.qkv(x), None
        if self.conv is not None:
            qkv, tail = self.conv(qkv, None if state is None else state.conv, cu_seqlens)
        qkv = qkv.unflatten(-1, (3, config.heads, config.head_dim)).permute(2, 0, 3, 1, 4)
        if cu_seqlens is None:
            o, *carried = self._rows(qkv, state)
        else:
            o, *carried = self._packed(qkv, state, cu_seqlens)
        return self.out(o.transpose(1, 2).flatten(2)), AttentionState(tail, *carried)

    def _rows(
        self, qkv: Tensor, state: AttentionState | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Every row of the batch is a text. Returns o, and keys, values and filled to carry."""
        tokens, device = qkv.shape[3], qkv.device
        past = 0 if state is None else state.keys.shape[2]
        filled = None if state is None else state.filled
        positions = torch.arange(past, past + tokens, device=device)
        if filled is not None:  # counted from each row's first token
            positions = (positions + filled.sum(1, keepdim=True) - past)[:, None]
        q, k = rotate(qkv[:2], positions, self.config.rope_base)
        v, mask = qkv[2], None
        if state is not None:
            k, v = torch.cat((state.keys, k), dim=2), torch.cat((state.values, v), dim=2)
        if past > 0:
            mask = torch.ones(tokens, past + tokens, dtype=torch.bool, device=device).tril(past)
        if filled is not None:
            filled = F.pad(filled, (0, tokens), value=True)
            mask = mask & filled[:, None, None]
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return o, k, v, filled

    def _packed(
        self, qkv: Tensor, state: AttentionState | None, cu_seqlens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same for documents one after the other in one row: those of a state go before all."""
        (_, _, heads, tokens, size), documents = qkv.shape, len(cu_seqlens) - 1
        document, positions = document_positions(cu_seqlens, tokens)
        number = torch.arange(documents, device=qkv.device)[:, None]
        filled = number == document  # [N, T]
        seen = document  # which document a slot is of; -1: of none
        if state is not None:
            before = state.filled
            if before is None:
                before = filled.new_ones(state.keys.shape[0], state.keys.shape[2])
            positions = positions + before.sum(1)[document]
            seen = torch.cat((torch.where(before, number, -1).flatten(), document))
        q, k = rotate(qkv[:2], positions, self.config.rope_base)
        v = qkv[2]
        mask = document[:, None] == seen
        mask = mask & torch.ones_like(mask).tril(len(seen) - tokens)
        keys, values = (x.expand(documents, -1, -1, -1) for x in (k, v))  # views: every row's are k
        if state is not None:
            k, v = (
                torch.cat((old.transpose(0, 1).reshape(1, heads, -1, size), new), dim=2)
                for old, new in ((state.keys, k), (state.values, v))
            )
            keys = torch.cat((state.keys, keys), dim=2)
            values = torch.cat((state.values, values), dim=2)
            filled = torch.cat((before, filled), dim=1)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return o, keys, values, filled


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Turns the pairs (x_i, x_{i + D/2}) of x [..., T, D] by position * base^(-2 i / D).

    positions: [T], or of more dimensions that go with x's, such as [B, 1, T].
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions[..., None] * frequencies
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
