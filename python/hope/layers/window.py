"""Attention to the last tokens alone: what it carries does not grow, and its cost is linear."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import register_dataclass

from hope.config import MagConfig
from hope.layers.attention import Persistent, document_positions, rotate_half
from hope.layers.conv import CausalConv


@dataclass
class WindowState:
    """What WindowAttention carries: the convolution's last inputs [B, K - 1, C]; keys and values
    [B, H, W - 1, D] of the last tokens, not yet rotated; how many tokens there were, int64 [B].
    """

    conv: Tensor
    keys: Tensor
    values: Tensor
    position: Tensor

    def detach(self) -> "WindowState":
        keys, values = self.keys.detach(), self.values.detach()
        return WindowState(self.conv.detach(), keys, values, self.position)


register_dataclass(WindowState)


class WindowAttention(nn.Module):
    """Every token attends to the last W tokens, itself included, and to the persistent ones.

    x [B, T, dim], y [B, T, H * D]; q, k and v pass a short causal convolution. Tokens are in a row
    of *slots*, behind W - 1 slots for those of an earlier call. Queries go in blocks of at most W;
    a block's keys are its own slots and the W - 1 before it, so that space is linear in T, and
    positions are counted inside a block: a text may be of any length, and may be cut anywhere.
    """

    def __init__(self, dim: int, config: MagConfig) -> None:
        super().__init__()
        self.config = config
        width = config.heads * config.head_dim
        self.qkv = nn.Linear(dim, 3 * width, bias=False)
        self.conv = CausalConv(3 * width, config.conv_width)
        self.persistent = Persistent(config.heads, config.head_dim, config.persistent)

    def init_weights(self) -> None:
        self.conv.init_weights()
        self.persistent.init_weights()

    def forward(
        self, x: Tensor, state: WindowState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, WindowState]:
        qkv, tail = self.conv(self.qkv(x), None if state is None else state.conv, cu_seqlens)
        qkv = qkv.unflatten(-1, (3, self.config.heads, self.config.head_dim))
        qkv = qkv.permute(2, 0, 3, 1, 4)  # [3, B, H, T, D]
        if state is not None:
            keys, values = state.keys.to(qkv.dtype), state.values.to(qkv.dtype)
            state = WindowState(tail, keys, values, state.position)
        if cu_seqlens is None:
            o, *carried = self._rows(qkv, state)
        else:
            o, *carried = self._packed(qkv, state, cu_seqlens)
        return o.transpose(1, 2).flatten(2), WindowState(tail, *carried)

    def _rows(self, qkv: Tensor, state: WindowState | None) -> tuple[Tensor, ...]:
        """Every row of the batch is a text. Returns o, and keys, values and position to carry."""
        (_, batch, heads, tokens, size), past = qkv.shape, self.config.window - 1
        if state is None:
            keys = values = qkv.new_zeros(batch, heads, past, size)
            position = torch.zeros(batch, dtype=torch.int64, device=qkv.device)
            filled = torch.zeros(1, past, dtype=torch.bool, device=qkv.device)
        else:
            keys, values, position = state.keys, state.values, state.position
            filled = _filled(position, past)
        k, v = torch.cat((keys, qkv[1]), dim=2), torch.cat((values, qkv[2]), dim=2)
        document = F.pad(filled.long() - 1, (0, tokens))  # -1: an empty slot
        o = self._attend(qkv[0], k, v, document)
        # Copies: slices would keep all keys of a long text alive.
        return o, k[:, :, tokens:].clone(), v[:, :, tokens:].clone(), position + tokens

    def _packed(
        self, qkv: Tensor, state: WindowState | None, cu_seqlens: Tensor
    ) -> tuple[Tensor, ...]:
        """The same for documents one after the other in one row.

        With a state, each stands behind W - 1 slots of its own; without, all share those at the
        front of the row, which are empty.
        """
        past, tokens, device = self.config.window - 1, qkv.shape[3], qkv.device
        bounds, count = cu_seqlens.long(), len(cu_seqlens) - 1
        number = torch.arange(count, device=device)
        before = torch.arange(past, device=device)
        gap = 0 if state is None else past
        document, _ = document_positions(cu_seqlens, tokens)
        slots = past + torch.arange(tokens, device=device) + gap * document  # of the tokens
        total = past + tokens + gap * max(0, count - 1)
        row = qkv.new_zeros(*qkv.shape[:3], total, qkv.shape[4]).index_copy(3, slots, qkv)
        documents = torch.full((total,), -1, device=device).index_copy(0, slots, document)
        position = bounds.diff()
        if state is not None:
            carried = (bounds[:-1] + gap * number)[:, None] + before  # slots [N, W - 1]
            pairs = torch.stack((state.keys, state.values))  # [2, N, H, W - 1, D]
            pairs = pairs.transpose(1, 2).flatten(2, 3)[:, None]
            kv = row[1:].index_copy(3, carried.flatten(), pairs)
            row = torch.cat((row[:1], kv))
            filled = torch.where(_filled(state.position, past), number[:, None], -1)
            documents = documents.index_copy(0, carried.flatten(), filled.flatten())
            position = state.position + position
        o = self._attend(row[0, :, :, past:], row[1], row[2], documents[None])
        last = (bounds[1:] + gap * number)[:, None] + before
        keys, values = row[1:, 0][:, :, last].transpose(1, 2)  # [N, H, W - 1, D]
        return o[:, :, slots - past], keys, values, position

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
        """o [B, H, T, D]; the queries q [B, H, T, D] are those of the last T slots.

        k, v: [B, H, W - 1 + T, D]. document: [B or 1, W - 1 + T]; a token sees its own number.
        """
        window, base = self.config.window, self.config.rope_base
        (batch, heads, tokens, _), past = q.shape, window - 1
        size = max(1, min(window, tokens))  # queries of a block; its keys are W - 1 more
        spare = -tokens % size
        q, k, v = (F.pad(x, (0, 0, 0, spare)) for x in (q, k, v))
        document = F.pad(document, (0, spare), value=-1)
        # Blocks first, [n, B, H, ., D]: they have a mask each, which batch and heads share.
        q = q.unflatten(2, (-1, size)).permute(2, 0, 1, 3, 4)
        k, v = (x.unfold(2, past + size, size).permute(2, 0, 1, 4, 3) for x in (k, v))
        document = document.unfold(1, past + size, size).transpose(
            0, 1
        )  # [n, B or 1, W - 1 + size]
        slot = torch.arange(past + size, device=q.device)
        behind = slot[past:, None] - slot
        mask = (behind >= 0) & (behind < window)  # [size, W - 1 + size]
        mask = mask & (document[..., past:, None] == document[..., None, :])
        q, k = rotate_half(q, slot[past:], base), rotate_half(k, slot, base)
        k, v, mask = self.persistent.prepend(k, v, mask)
        if len(mask[0]) > 1:
            mask = mask[:, :, None].expand(-1, -1, heads, -1, -1).flatten(1, 2)
        o = F.scaled_dot_product_attention(*(x.flatten(1, 2) for x in (q, k, v)), attn_mask=mask)
        o = o.unflatten(1, (batch, heads)).permute(1, 2, 0, 3, 4).flatten(2, 3)
        return o[:, :, :tokens]


def _filled(position: Tensor, past: int) -> Tensor:
    """Which of the `past` slots hold a token after `position` [B] of them; [B, past]."""
    return torch.arange(past, device=position.device) >= past - position[:, None]
