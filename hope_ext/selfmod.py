"""HOPE's self-modifying Titans: public function and its checks.

Fake kernels and autograd are in _selfmod_autograd.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.utils import _pytree

from hope_ext import _check, _load, _selfmod_autograd
from hope_ext.reference import selfmod as reference


@dataclass(frozen=True)
class SelfModifyingWeights:
    """The matrices of five memories: each is `(W,)`, M(x) = x @ W, or `(W1, W2)`, M(x) =
    x + act(x @ W1) @ W2; all linear or all deep.

    Attributes:
        k, v, memory: D to D.
        lr, retention: D to 1; without the `x +`.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    lr: tuple[Tensor, ...]
    retention: tuple[Tensor, ...]
    memory: tuple[Tensor, ...]

    def _map(self, function: Callable[[Tensor], Tensor]) -> SelfModifyingWeights:
        return self._like([function(w) for w in self._flat()])

    def _flat(self) -> list[Tensor]:
        return [w for name in reference.NAMES for w in getattr(self, name)]

    def _like(self, matrices: Sequence[Tensor]) -> SelfModifyingWeights:
        """These matrices, in the order of `_flat`, under their names."""
        rest = iter(matrices)
        return SelfModifyingWeights(
            *(tuple(next(rest) for _ in getattr(self, name)) for name in reference.NAMES)
        )

    def detach(self) -> SelfModifyingWeights:
        """The same weights, cut off from the graph that made them."""
        return self._map(Tensor.detach)

    def to(self, device: torch.device | str) -> SelfModifyingWeights:
        """The same weights on another device."""
        return self._map(lambda w: w.to(device))


@dataclass(frozen=True)
class SelfModifyingState:
    """What self-modifying memories carry from call to call.

    Attributes:
        weights: with a leading batch dimension, [B, H, ., .] (with packed sequences, B is their
        number).
        anchor: the weights at the start of the current chunk; equal to `weights` at a chunk
        boundary.
        position: int64 [B], the tokens seen.
        chunk_size: the chunk size that `position` and `anchor` refer to; None: any call's.
    """

    weights: SelfModifyingWeights
    anchor: SelfModifyingWeights
    position: Tensor
    chunk_size: int | None = None

    def detach(self) -> SelfModifyingState:
        """The same state, cut off from the graph that made it: truncates the outer gradient."""
        return replace(
            self,
            weights=self.weights.detach(),
            anchor=self.anchor.detach(),
            position=self.position.detach(),
        )

    def to(self, device: torch.device | str) -> SelfModifyingState:
        """The same state on another device."""
        return replace(
            self,
            weights=self.weights.to(device),
            anchor=self.anchor.to(device),
            position=self.position.to(device),
        )


_pytree.register_pytree_node(
    SelfModifyingWeights,
    lambda weights: ([getattr(weights, field.name) for field in fields(weights)], None),
    lambda leaves, _: SelfModifyingWeights(*leaves),
    serialized_type_name="hope_ext.SelfModifyingWeights",
)
_pytree.register_pytree_node(
    SelfModifyingState,
    lambda state: ([state.weights, state.anchor, state.position], state.chunk_size),
    lambda leaves, chunk_size: SelfModifyingState(*leaves, chunk_size),
    serialized_type_name="hope_ext.SelfModifyingState",
)


def self_modifying_memory(
    x: Tensor,
    q: Tensor,
    memories: SelfModifyingWeights,
    lr_bias: Tensor,
    retention_bias: Tensor,
    *,
    state: SelfModifyingState | None = None,
    chunk_size: int = 64,
    lr_max: float = 1.0,
    activation: str = "gelu",
    objective: str = "l2",
    read: str = "before",
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, SelfModifyingState]:
    """Memories that generate their own keys, values, learning rates and retention, and rewrite
    themselves token by token (HOPE's self-modifying Titans: Nested Learning, arXiv 2512.24695,
    eqs. 83-97).

    A memory is linear, M(x) = x @ W, or deep, M(x) = x + act(x @ W1) @ W2, where `lr` and
    `retention` leave out the `x +`. For every token t of a chunk, with the anchor a, the weights at
    the chunk's start:

        k_t = M_k^a(x_t) / max(|M_k^a(x_t)|, 1e-6)           v_t = M_v^a(x_t)
        eta_t = lr_max * sigmoid(M_lr^a(x_t) + lr_bias)
        alpha_t = sigmoid(M_retention^a(x_t) + retention_bias)
        for each memory M:
            grad = gradient of 1/2 |M^a(k_t) - M^a(v_t)|^2 ("l2")  or  -<M^a(k_t), M^a(v_t)> ("dot")
                   with M^a(v_t), its own value, as a constant
            first layer    W <- (alpha_t I - eta_t k_t^T k_t) W - eta_t grad
            second layer   W <- alpha_t W - eta_t grad
        o_t = M_memory(q_t) with the weights before this token's update (read "before"), after it
              ("after"), or the anchor ("chunk")

    Gradients flow to every floating-point input, through all inner steps (the constant above
    included: it is one of the inner problem only) and a carried state; they are exact for the
    chunked computation. There is no double backward.

    Args:
        x: what the memories learn from, [B, T, H, D]; float32, bfloat16 or float16 (float64 on the
            CPU).
        q: queries [B, T, H, D], of x's dtype.
        memories: the initial memories, float32 (float64 with float64 rows), shared over the batch:
            `k`, `v` and `memory` are `(W [H, D, D],)` or `(W1 [H, D, F], W2 [H, F, D])`, `lr` and
            `retention` `(W [H, D, 1],)` or `(W1 [H, D, F], W2 [H, F, 1])`; all linear or all deep.
        lr_bias, retention_bias: [H], of the memories' dtype.
        state: the state returned by an earlier call; the memories go on from there and `memories`
            is not used. Any split of a sequence, single tokens included, gives what one call gives.
        chunk_size: tokens per chunk, counted from the start of the sequence.
        lr_max: the largest learning rate.
        activation: of deep memories: "gelu" (its tanh approximation) or "silu".
        objective, read: see above.
        cu_seqlens: int32 [N + 1], the bounds of N sequences packed into one row (B = 1); each
            starts anew from `memories`, or from its row of `state`.
        return_state: also return the state after the last token.

    Returns:
        o [B, T, H, D] in q's dtype; with `return_state`, (o, SelfModifyingState).

    Under `torch.autocast` x and q are cast to the autocast dtype, memories and biases to float32.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. On CUDA head
            sizes are 16, 32, 64 or 128, hidden sizes multiples of 16.

    The stability of the inner loop is the caller's concern: deep memories with rows x and q of
    length 1, lr_bias near -5, retention_bias near 12 and small W2 are stable; linear memories
    generate all their values from themselves and can only decay or grow.
    """
    # The meta device knows no autocast.
    if isinstance(x, Tensor) and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, q = _cast(x, dtype), _cast(q, dtype)
        memories = _pytree.tree_map(lambda w: _cast(w, torch.float32), memories)
        lr_bias, retention_bias = (_cast(b, torch.float32) for b in (lr_bias, retention_bias))
    _check_rows(x, q)
    _check_memories(x, memories)
    wide = memories.k[0].dtype
    for name, bias in (("lr_bias", lr_bias), ("retention_bias", retention_bias)):
        _check.tensor(name, bias, (wide,), x.device, like="x")
        _check.shape(name, bias, x.shape[2:3], "H")
    _check.positive("chunk_size", chunk_size)
    _check.number("lr_max", lr_max)
    if not 0 <= lr_max < float("inf"):
        raise ValueError(f"lr_max: expected a finite number of at least 0, got {lr_max}")
    _check.choice("activation", activation, ("gelu", "silu"))
    _check.choice("objective", objective, ("l2", "dot"))
    _check.choice("read", read, ("after", "before", "chunk"))
    sequences = len(x) if cu_seqlens is None else _check.cu_seqlens(cu_seqlens, x, "x")
    if state is not None:
        _check_state(state, sequences, memories, chunk_size)

    biases = [b.expand(sequences, *b.shape) for b in (lr_bias, retention_bias)]
    if state is None:
        start = [w.expand(sequences, *w.shape) for w in memories._flat()]
        anchor, position = [], None
    else:
        start, anchor, position = state.weights._flat(), state.anchor._flat(), state.position
    tensors = (x, q, start, *biases, anchor, position, cu_seqlens)
    options = (chunk_size, float(lr_max), activation, objective, read)
    if _load.use_reference():
        o, weights, anchor = reference.selfmod(*tensors, *options)
    else:
        trains = torch.is_grad_enabled() and any(
            y.requires_grad for y in (x, q, *start, *biases, *anchor)
        )
        every = _chunks_per_checkpoint(x, start, chunk_size) if trains else 0
        o, weights, anchor, _ = _load.operators().selfmod(*tensors, *options, every)
    if not return_state:
        return o
    lengths = x.shape[1] if cu_seqlens is None else cu_seqlens.diff().long()
    before = (
        torch.zeros(sequences, dtype=torch.int64, device=x.device) if position is None else position
    )
    return o, SelfModifyingState(
        weights=memories._like(weights),
        anchor=memories._like(anchor),
        position=before + lengths,
        chunk_size=chunk_size,
    )


def _cast(x: object, to: torch.dtype) -> object:
    wanted = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(to) if wanted else x


def _check_rows(x, q) -> None:
    _check.tensor("x", x, _check.ROW_DTYPES)
    _check.dimensions("x", x, "B T H D")
    _check.tensor("q", q, (x.dtype,), x.device, like="x")
    _check.shape("q", q, x.shape, "B T H D")


def _check_memories(x, memories) -> None:
    if not isinstance(memories, SelfModifyingWeights):
        raise TypeError(f"memories: expected a SelfModifyingWeights, got {type(memories).__name__}")
    heads, dim = x.shape[2:]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    deep = isinstance(memories.k, tuple | list) and len(memories.k) == 2
    for name in reference.NAMES:
        matrices, columns = getattr(memories, name), 1 if name in reference.GATES else dim
        to = "1" if name in reference.GATES else "D"
        where = f"memories.{name}"
        if not isinstance(matrices, tuple | list):
            raise TypeError(
                f"{where}: expected a tuple (W,) or (W1, W2) of tensors, "
                f"got {type(matrices).__name__}"
            )
        if len(matrices) not in (1, 2) or (len(matrices) == 2) != deep:
            expected = (
                f"(W,) or (W1, W2), W [H, D, {to}], W1 [H, D, F], W2 [H, F, {to}]"
                if name == "k"
                else f"{'(W1, W2)' if deep else '(W,)'}, as deep as memories.k"
            )
            raise ValueError(f"{where}: expected {expected}, got a tuple of {len(matrices)}")
        for i, w in enumerate(matrices):
            _check.tensor(f"{where}[{i}]", w, (wide,), x.device, like="x")
        if not deep:
            _check.shape(f"{where}[0]", matrices[0], (heads, dim, columns), f"H D {to}")
            continue
        _check.dimensions(f"{where}[0]", matrices[0], "H D F")
        hidden = matrices[0].shape[2]
        _check.shape(f"{where}[0]", matrices[0], (heads, dim, max(hidden, 1)), "H D F")
        _check.shape(f"{where}[1]", matrices[1], (heads, hidden, columns), f"H F {to}")


def _check_state(state, sequences, memories, chunk_size) -> None:
    if not isinstance(state, SelfModifyingState):
        raise TypeError(f"state: expected a SelfModifyingState, got {type(state).__name__}")
    for part in ("weights", "anchor"):
        given = getattr(state, part)
        if not isinstance(given, SelfModifyingWeights):
            raise TypeError(
                f"state.{part}: expected a SelfModifyingWeights, got {type(given).__name__}"
            )
        for name in reference.NAMES:
            matrices, like = getattr(given, name), getattr(memories, name)
            where = f"state.{part}.{name}"
            if not isinstance(matrices, tuple | list) or len(matrices) != len(like):
                tensors = "1 tensor" if len(like) == 1 else "2 tensors"
                raise ValueError(
                    f"{where}: expected a tuple of {tensors}, like memories.{name}, "
                    f"got {matrices!r:.80}"
                )
            for i, (matrix, w) in enumerate(zip(matrices, like, strict=True)):
                _check.tensor(f"{where}[{i}]", matrix, (w.dtype,), w.device, like="x")
                _check.shape(f"{where}[{i}]", matrix, (sequences, *w.shape), "B H . .")
    _check.tensor("state.position", state.position, (torch.int64,), memories.k[0].device, "x")
    _check.shape("state.position", state.position, (sequences,), "B")
    if state.chunk_size is not None:
        _check.chunk_size_of_state(state.chunk_size, state.position, chunk_size)


def _chunks_per_checkpoint(x: Tensor, weights: list[Tensor], chunk_size: int) -> int:
    """Chunks between kept states, for the backward: as few as take no more memory than x and q."""
    state_bytes = sum(w.shape[-2] * w.shape[-1] for w in weights) * weights[0].element_size()
    rows_of_chunk = chunk_size * 2 * x.shape[3] * x.element_size()
    return max(1, -(-state_bytes // max(1, rows_of_chunk)))


_load.register(_selfmod_autograd.register)
