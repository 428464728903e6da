"""The continuum memory system in the MLP's place (Nested Learning, arXiv 2512.24695, section 7).

A *level* is an MLP that a text rewrites after every chunk of its tokens, by their gradients.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import hope_ext
from hope.config import ModelConfig
from hope.layers.mlp import MLP

CmsStates = tuple[hope_ext.CmsState, ...]  # one for each level; none where nothing is rewritten

# The share of its largest inner learning rate that a token starts with.
_SHARE = 0.1


class CmsLevel(nn.Module):
    """An MLP and the norm of what it reads, x [B, T, dim]: where a level starts on every text."""

    def __init__(self, dim: int, hidden: int, activation: str, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=eps)
        self.mlp = MLP(dim, hidden, activation)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """(W1 [dim, F], W2 [F, dim]) as `hope_ext.cms_memory` takes them."""
        return self.mlp.up.weight.mT, self.mlp.down.weight.mT


class ContinuumMemory(nn.Module):
    """Levels of `hope_ext.cms_memory`, each a pre-norm block; x and y [B, T, dim].

    sequential:     h_i = h_(i-1) + M_i(norm_i(h_(i-1))),  h_0 = x,  y = h_k
    independent:    y = x + sum over i of M_i(norm_i(x))
    nested:         y = x + M_1(norm(x))

    M_i is rewritten after every chunk_sizes[i] tokens, by the gradients of
    1/2 |M_i(n) - n P|^2 / dim for the inputs n = norm_i(.) of the chunk, each times its rate

        lr_max / chunk_size * sigmoid(rate_i(n)) / (1 + F / (2 dim))

    The divisor is about the curvature: that of W2 is |act(n W1)|^2 / dim, near F / (2 dim), and
    that of W1 the square of what W2 does to an error, near 1 at most. The levels share the
    projection P: texts that are shorter than a level's chunk cannot teach it what to remember, but
    the faster levels learn a P that serves it, too.

    In the nested form all levels are one MLP. A level starts anew whenever the next slower one
    moves, from where that one is; all learn, and the fastest answers.

    `forward(x, states=None, cu_seqlens=None)` also returns the levels' states, which a later call
    takes; with `return_states=False` there are none, and what nobody would read is not learned.
    Without `updates` there is nothing to learn, no P and no rates, and no state: one level is the
    MLP of two matrices, bit for bit.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, dim = config.cms, config.dim
        self.levels = nn.ModuleList(
            CmsLevel(dim, hidden, self.config.activation, config.norm_eps)
            for hidden in config.mlp_dims
        )
        if self.config.updates:
            self.target = nn.Linear(dim, dim, bias=False)
            self.rates = nn.ModuleList(nn.Linear(dim, 1) for _ in self.config.chunk_sizes)

    def init_weights(self) -> None:
        """Initial values of what is special here; `hope.model` initialises the linear layers."""
        if self.config.updates:
            for rate in self.rates:
                nn.init.constant_(rate.bias, math.log(_SHARE / (1 - _SHARE)))

    def writers(self) -> list[nn.Linear]:
        """The layers that write into the residual stream, or say what is to be written."""
        targets = [self.target] if self.config.updates else []
        return [level.mlp.down for level in self.levels] + targets

    def forward(
        self,
        x: Tensor,
        states: CmsStates | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        return_states: bool = True,
    ) -> tuple[Tensor, CmsStates]:
        config = self.config
        if states is not None and len(states) != len(config.chunk_sizes) * config.updates:
            expected = len(config.chunk_sizes) * config.updates
            raise ValueError(f"state must hold {expected} levels of a CMS, not {len(states)}")
        if config.variant == "nested" and config.updates:
            return self._nested(x, states, cu_seqlens)
        h, after = x, []
        for i, level in enumerate(self.levels):
            n = level.norm(x if config.variant == "independent" else h)
            if config.updates:
                learned = (i, n, self.target(n), self._rate(i, n), states and states[i], cu_seqlens)
                if return_states:
                    y, state = self._learn(*learned, return_state=True)
                    after.append(state)
                else:
                    y = self._learn(*learned, return_state=False)
            else:
                y = level.mlp(n)
            h = h + y
        return h, tuple(after)

    def _learn(
        self,
        i: int,
        n: Tensor,
        target: Tensor,
        rate: Tensor,
        state: hope_ext.CmsState | None,
        cu_seqlens: Tensor | None = None,
        *,
        return_state: bool = True,
    ) -> Tensor | tuple[Tensor, hope_ext.CmsState]:
        """What level i answers to n [B, T, dim], while it learns; its state, too, if asked for."""
        weights = self.levels[i % len(self.levels)].matrices()
        if state is None:  # or the operator would make every sequence's copy contiguous
            weights = tuple(w.contiguous() for w in weights)
        return hope_ext.cms_memory(
            n,
            weights,
            rate,
            target,
            state=state,
            chunk_size=self.config.chunk_sizes[i],
            activation=self.config.activation,
            objective="l2",
            residual=False,
            cu_seqlens=cu_seqlens,
            return_state=return_state,
        )

    def _rate(self, i: int, n: Tensor) -> Tensor:
        """Level i's inner learning rates of n [B, T, dim], [B, T] float32."""
        rate, dim = self.rates[i], n.shape[-1]
        hidden = self.levels[i % len(self.levels)].mlp.up.out_features
        # The bias is added in float32: bfloat16 would round the token's part away.
        share = (F.linear(n, rate.weight).to(rate.bias.dtype) + rate.bias).sigmoid()[..., 0]
        return self.config.lr_max / self.config.chunk_sizes[i] / (dim + hidden / 2) * share

    # ---- nested levels -------------------------------------------------------------------------

    def _nested(
        self, x: Tensor, states: CmsStates | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, CmsStates]:
        """Levels start anew at tokens of the text: rows that are not at one place go alone.

        They always return their states: between two cuts they are needed.
        """
        n = self.levels[0].norm(x)
        target = self.target(n)
        rates = torch.stack([self._rate(i, n) for i in range(len(self.rates))])  # [k, B, T]
        if cu_seqlens is not None:
            bounds = itertools.pairwise(cu_seqlens.tolist())
            rows = [(slice(None), slice(*ends)) for ends in bounds]
        elif states is None or bool((states[0].position == states[0].position[:1]).all()):
            y, after = self._nested_together(n, target, rates, states)
            return x + y, after
        else:
            rows = [(slice(i, i + 1), slice(None)) for i in range(len(n))]
        answers = [
            self._nested_together(n[row], target[row], rates[(slice(None), *row)], one)
            for row, one in zip(rows, _each_row(states, len(rows)), strict=True)
        ]
        y = torch.cat([y for y, _ in answers], 0 if cu_seqlens is None else 1)
        after = pytree.tree_map(lambda *leaves: torch.cat(leaves), *(end for _, end in answers))
        return x + y, after

    def _nested_together(
        self, n: Tensor, target: Tensor, rates: Tensor, states: CmsStates | None
    ) -> tuple[Tensor, CmsStates]:
        """Sequences that are all at one place of their texts, cut where the second level moves."""
        sizes = self.config.chunk_sizes
        position = 0 if states is None or len(n) == 0 else int(states[0].position[0])
        levels = [None] * len(sizes) if states is None else list(states)
        parts, tokens, start = [], n.shape[1], 0
        while not parts or start < tokens:
            here = position + start
            until = sizes[1] - here % sizes[1] if len(sizes) > 1 else tokens
            cut = slice(start, min(tokens, start + until))
            for i in reversed(range(len(sizes) - 1)):  # a slower one may itself start anew
                if here % sizes[i + 1] == 0:
                    levels[i] = _restarted(levels[i + 1])
            answers = [
                self._learn(i, n[:, cut], target[:, cut], rates[i, :, cut], levels[i])
                for i in range(len(sizes))
            ]
            parts.append(answers[0][0])
            levels = [state for _, state in answers]
            start = cut.stop
        return torch.cat(parts, 1), tuple(levels)


def _restarted(slower: hope_ext.CmsState | None) -> hope_ext.CmsState | None:
    """The state of a level that starts from where the next slower one is."""
    if slower is None:
        return None
    pending = tuple(map(torch.zeros_like, slower.pending))
    return hope_ext.CmsState(slower.weights, pending, slower.position)


def _each_row(states: CmsStates | None, rows: int) -> list[CmsStates | None]:
    """The states of each row alone, with a batch of 1."""
    if states is None:
        return [None] * rows
    return [pytree.tree_map(lambda x, i=i: x[i : i + 1], states) for i in range(rows)]
