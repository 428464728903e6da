"""Memory as a context (Titans, arXiv 2501.00663, section 4.1)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import register_dataclass
from torch.utils import _pytree as pytree

from hope.config import MacConfig
from hope.errors import HopeError
from hope.layers.attention import Persistent, rotate_half
from hope.layers.conv import CausalConv
from hope.layers.memory import NeuralMemory, TitansMemoryState
from hope.layers.unit import RMSNorm


@dataclass
class MacState:
    """What MemoryAsContext carries inside a segment.

    conv: the convolution's last inputs [B, K - 1, C].
    memory: after the last token; its position says how far into the segment that is.
    before: the memory's weights before the segment, each [B, H, ., .].
    keys, values: of the segment's tokens so far, [B, H, segment, 2, D]: for each token those of
    what was retrieved for it and its own; zeros for the tokens to come.
    """

    conv: Tensor
    memory: TitansMemoryState
    before: tuple[Tensor, ...]
    keys: Tensor
    values: Tensor

    def detach(self) -> "MacState":
        conv, memory = self.conv.detach(), self.memory.detach()
        before = tuple(w.detach() for w in self.before)
        return MacState(conv, memory, before, self.keys.detach(), self.values.detach())


register_dataclass(MacState)


class MemoryAsContext(nn.Module):
    """Attention inside segments, to the tokens and to what the memory retrieves for them.

    For a segment of tokens x, with M the memory before it:

        h_t = M(q(x_t))                                     nothing is learned here
        y_t = attention of t to the persistent keys, and to h_s and x_s of the segment for s <= t
        o_t = y_t * 2 sigmoid(M_t(y_t))                     M_t: M having learned y_s for s <= t

    Everything a token sees is at or before it: h_s for s > t would tell of x_s, so attention to h
    is causal too, and o_t reads the memory as of its own token instead of the segment's end. Keys
    and values of h and x have one projection; those of x then pass a short causal convolution.

    Segments are counted from the start of the text, not of the call. In an unfinished segment the
    state holds M, the memory after the last token, and the keys and values so far; hence a call
    computes for every token just what one call over the whole text does, wherever the text is cut.
    Segment follows segment, because M before one is the result of the one before. Documents, and
    rows of a batch that stand at different places of their segments, are read one by one; finding
    out where rows stand waits for the device.
    """

    def __init__(self, dim: int, config: MacConfig) -> None:
        super().__init__()
        self.config = config
        width = config.heads * config.head_dim
        if width != dim:
            raise HopeError(
                "model.mixer: with mac, heads * head_dim must be model.dim "
                f"({dim}), because what the memory retrieves is read like tokens, not {width}"
            )
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.conv = CausalConv(3 * dim, config.conv_width)
        self.persistent = Persistent(config.heads, config.head_dim, config.persistent)
        self.memory = NeuralMemory(dim, config)
        self.attention_norm = RMSNorm(dim)
        self.memory_norm = RMSNorm(dim)
        self.out = nn.Linear(dim, dim, bias=False)

    def init_weights(self) -> None:
        self.conv.init_weights()
        self.persistent.init_weights()
        self.memory.init_weights()

    def forward(
        self, x: Tensor, state: MacState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MacState]:
        if cu_seqlens is not None:
            texts = x.split(cu_seqlens.diff().tolist(), dim=1)
            return self._one_by_one(texts, state, dim=1)
        if state is None:
            return self._rows(x, None, 0)
        places = set((state.memory.memory.position % self.config.segment).tolist())
        if len(places) > 1:
            return self._one_by_one(x.split(1), state, dim=0)
        return self._rows(x, state, *places)

    def _one_by_one(
        self, texts: tuple[Tensor, ...], state: MacState | None, dim: int
    ) -> tuple[Tensor, MacState]:
        """Texts [1, T, dim] that begin with the state's rows; joined again in dimension `dim`."""
        results = []
        for n, text in enumerate(texts):
            row = pytree.tree_map(lambda leaf, n=n: _rows_of(leaf, n), state)
            results.append(self(text, row))
        outputs, states = zip(*results, strict=True)
        return torch.cat(outputs, dim), pytree.tree_map(_join, *states)

    def _rows(self, x: Tensor, state: MacState | None, place: int) -> tuple[Tensor, MacState]:
        """A batch of texts, all of them `place` tokens into a segment."""
        config, (batch, tokens, _) = self.config, x.shape
        positions = (place + torch.arange(tokens, device=x.device)) % config.segment
        qkv, tail = self.conv(self.qkv(x), None if state is None else state.conv)
        q, k, v = self._heads(qkv)
        q, k = (rotate_half(rows, positions, config.rope_base) for rows in (q, k))
        if state is None:
            memory, before = None, self.memory.start(batch)
            keys = values = k.new_zeros(batch, config.heads, 0, 2, config.head_dim)
        else:
            memory, before = state.memory, state.before
            keys, values = (rows[:, :, :place].to(k.dtype) for rows in (state.keys, state.values))
        outputs, start = [], 0
        while start < tokens or not outputs:  # once for an empty text, which has a state too
            stop = min(tokens, start + config.segment - place)
            here = slice(start, stop)
            h = self.memory.retrieve(x[:, here], before)
            h_keys, h_values = self._heads(F.linear(h, self.qkv.weight[x.shape[2] :]))
            h_keys = rotate_half(h_keys, positions[here], config.rope_base)
            keys = torch.cat((keys, torch.stack((h_keys, k[:, :, here]), 3)), 2)
            values = torch.cat((values, torch.stack((h_values, v[:, :, here]), 3)), 2)
            y = self.attention_norm(self._attend(q[:, :, here], keys, values))
            read, memory = self.memory(y, memory)
            outputs.append(y * (2 * self.memory_norm(read).sigmoid()))  # the gate begins near 1
            place, start = place + stop - start, stop
            if place == config.segment:
                place, before = 0, memory.memory.weights
                keys, values = keys[:, :, :0], values[:, :, :0]
        rest = (0, 0, 0, 0, 0, config.segment - place)
        state = MacState(tail, memory, before, F.pad(keys, rest), F.pad(values, rest))
        return self.out(torch.cat(outputs, 1)), state

    def _heads(self, rows: Tensor) -> Tensor:
        """[n, B, H, T, D] of rows [B, T, n H D]."""
        shape = (-1, self.config.heads, self.config.head_dim)
        return rows.unflatten(-1, shape).permute(2, 0, 3, 1, 4)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """y [B, n, H D] for the segment's last n tokens, q [B, H, n, D]; keys [B, H, ., 2, D]."""
        new, seen = q.shape[2], keys.shape[2]
        mask = torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(seen - new)
        mask = mask.repeat_interleave(2, dim=1)
        k, v, mask = self.persistent.prepend(keys.flatten(2, 3), values.flatten(2, 3), mask)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).flatten(2)


def _rows_of(leaf: Tensor | None, n: int) -> Tensor | None:
    return None if leaf is None else leaf[n : n + 1]


def _join(*leaves: Tensor | None) -> Tensor | None:
    return None if leaves[0] is None else torch.cat(leaves)
