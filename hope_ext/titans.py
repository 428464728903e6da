"""The Titans memory's inner gradient step: public function, fake kernels, autograd."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils import _pytree

from hope_ext import _check, _load
from hope_ext.reference import titans as reference


@dataclass(frozen=True)
class TitansState:
    """What a Titans memory carries from call to call.

    Attributes:
        weights: the memory's matrices, each [B, H, D_in, D_out] (with packed sequences, B is their
        number).
        momenta: S of every matrix, the same shapes; None without momentum.
        anchor: the weights at the start of the current chunk; equal to `weights` at a chunk
        boundary.
        position: int64 [B], the tokens seen.
        chunk_size: the chunk size that `position` and `anchor` refer to.
    """

    weights: tuple[Tensor, ...]
    momenta: tuple[Tensor, ...] | None
    anchor: tuple[Tensor, ...]
    position: Tensor
    chunk_size: int

    def _map(self, function) -> TitansState:
        return replace(
            self,
            weights=tuple(map(function, self.weights)),
            momenta=None if self.momenta is None else tuple(map(function, self.momenta)),
            anchor=tuple(map(function, self.anchor)),
            position=function(self.position),
        )

    def detach(self) -> TitansState:
        """The same state, cut off from the graph that made it: truncates the outer gradient."""
        return self._map(Tensor.detach)

    def to(self, device: torch.device | str) -> TitansState:
        """The same state on another device."""
        return self._map(lambda x: x.to(device))


_pytree.register_pytree_node(
    TitansState,
    lambda state: ([state.weights, state.momenta, state.anchor, state.position], state.chunk_size),
    lambda leaves, chunk_size: TitansState(*leaves, chunk_size),
    serialized_type_name="hope_ext.TitansState",
)


def titans_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    weights: tuple[Tensor, ...],
    momentum: Tensor | None = None,
    decay: Tensor | None = None,
    *,
    state: TitansState | None = None,
    chunk_size: int = 64,
    activation: str = "gelu",
    residual: bool = True,
    objective: str = "l2",
    read: str = "after",
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, TitansState]:
    """A memory that is trained while it is read (Titans, arXiv 2501.00663, eqs. 8-18), chunk by
    chunk.

    For every token t, with grad_t the gradient of the inner loss at the anchor, the weights at the
    chunk's start:

        inner loss   1/2 |k_t @ W_anchor - v_t|^2 ("l2")   or   -<k_t @ W_anchor, v_t> ("dot")
        S_t = momentum_t * S_{t-1} - lr_t * grad_t          (without momentum: S_t = -lr_t * grad_t)
        W_t = (1 - decay_t) * W_{t-1} + S_t
        o_t = q_t @ W_t (read "after")   |   q_t @ W_{t-1} ("before")   |   q_t @ W_anchor ("chunk")

    Gradients flow to every floating-point input, through all inner steps and a carried state; they
    are exact for the
    chunked computation. There is no double backward.

    Args:
        q, k: queries and keys [B, T, H, D]; float32, bfloat16 or float16 (float64 on the CPU), one
        dtype with v.
        v: values [B, T, H, D_v].
        lr: inner learning rates [B, T, H], >= 0, float32 (float64 with float64 rows), like the next
        two.
        weights: the initial memory `(W,)`, W [H, D, D_v], of lr's dtype, shared over the batch.
        momentum: [B, T, H] in [0, 1], or None.
        decay: how much is forgotten before a token is learned, [B, T, H] in [0, 1], or None.
        state: the state returned by an earlier call; the memory goes on from there and `weights` is
        not used.
            Any split of a sequence, single tokens included, gives what one call gives.
        chunk_size: tokens per chunk, counted from the start of the sequence.
        activation, residual: concern deep memories only.
        objective, read: see above.
        cu_seqlens: int32 [N + 1], the bounds of N sequences packed into one row (B = 1); each
        starts anew from
            `weights`, or from its row of `state`.
        return_state: also return the state after the last token.

    Returns:
        o [B, T, H, D_v] in q's dtype; with `return_state`, (o, TitansState).

    Under `torch.autocast` q, k and v are cast to the autocast dtype, gates and weights to float32.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    The stability of the inner loop is the caller's concern: with unit keys that repeat it is stable
    for about
    chunk_size * lr / (1 - momentum) < 2.
    """
    # The meta device knows no autocast.
    if isinstance(q, Tensor) and not q.is_meta and torch.is_autocast_enabled(q.device.type):
        q, k, v, lr, momentum, decay, weights = _autocast(q, k, v, lr, momentum, decay, weights)
    sequences = _check_arguments(
        q,
        k,
        v,
        lr,
        weights,
        momentum,
        decay,
        state,
        chunk_size,
        activation,
        residual,
        objective,
        read,
        cu_seqlens,
    )
    if state is None:
        (start,) = (w.expand(sequences, *w.shape) for w in weights)
        momenta = anchor = position = None
    else:
        (start,), (anchor,), position = state.weights, state.anchor, state.position
        momenta = None if state.momenta is None else state.momenta[0]

    arguments = (
        q,
        k,
        v,
        lr,
        momentum,
        decay,
        start,
        momenta,
        anchor,
        position,
        cu_seqlens,
        chunk_size,
        objective,
        read,
    )
    if _load.use_reference():
        o, *final = reference.titans_linear(*arguments)
    else:
        trains = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in arguments[:9]
        )
        every = _chunks_per_checkpoint(q, v, chunk_size, momentum is not None) if trains else 0
        o, *final, _ = _load.operators().titans_linear(*arguments, every)
    if not return_state:
        return o
    lengths = q.shape[1] if cu_seqlens is None else cu_seqlens.diff().long()
    before = (
        torch.zeros(sequences, dtype=torch.int64, device=q.device) if position is None else position
    )
    weights, momenta, anchor = final
    return o, TitansState(
        weights=(weights,),
        momenta=None if momentum is None else (momenta,),
        anchor=(anchor,),
        position=before + lengths,
        chunk_size=chunk_size,
    )


def _autocast(q, k, v, lr, momentum, decay, weights):
    dtype = torch.get_autocast_dtype(q.device.type)

    def cast(x, to):
        return (
            x.to(to)
            if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
            else x
        )

    q, k, v = (cast(x, dtype) for x in (q, k, v))
    lr, momentum, decay = (cast(x, torch.float32) for x in (lr, momentum, decay))
    if isinstance(weights, tuple):
        weights = tuple(cast(w, torch.float32) for w in weights)
    return q, k, v, lr, momentum, decay, weights


def _check_arguments(
    q,
    k,
    v,
    lr,
    weights,
    momentum,
    decay,
    state,
    chunk_size,
    activation,
    residual,
    objective,
    read,
    cu_seqlens,
) -> int:
    """Raises what the public function documents; returns the number of sequences."""
    _check.tensor("q", q, _check.ROW_DTYPES)
    _check.dimensions("q", q, "B T H D")
    batch, tokens, heads, key = q.shape
    for name, x in (("k", k), ("v", v)):
        _check.tensor(name, x, (q.dtype,), q.device)
    _check.shape("k", k, q.shape, "B T H D")
    _check.dimensions("v", v, "B T H D_v")
    value = v.shape[3]
    _check.shape("v", v, (batch, tokens, heads, value), "B T H D_v")
    accumulation = (torch.float64 if q.dtype == torch.float64 else torch.float32,)
    for name, x in (("lr", lr), ("momentum", momentum), ("decay", decay)):
        if x is not None or name == "lr":
            _check.tensor(name, x, accumulation, q.device)
            _check.shape(name, x, (batch, tokens, heads), "B T H")
    if not isinstance(weights, tuple | list):
        raise TypeError(f"weights: expected a tuple (W,) of tensors, got {type(weights).__name__}")
    if len(weights) != 1:
        raise ValueError(
            f"weights: expected a linear memory (W,), W [H, D, D_v], got a tuple of {len(weights)}"
        )
    _check.tensor("weights[0]", weights[0], accumulation, q.device)
    _check.shape("weights[0]", weights[0], (heads, key, value), "H D D_v")
    _check.positive("chunk_size", chunk_size)
    _check.choice("activation", activation, ("gelu", "silu"))
    _check.choice("objective", objective, ("l2", "dot"))
    _check.choice("read", read, ("after", "before", "chunk"))
    if not isinstance(residual, bool):
        raise TypeError(f"residual: expected a bool, got {residual!r}")
    sequences = batch if cu_seqlens is None else _check.cu_seqlens(cu_seqlens, q)
    if state is not None:
        _check_state(
            state, (sequences, heads, key, value), accumulation, q.device, momentum, chunk_size
        )
    return sequences


def _check_state(state, shape, accumulation, device, momentum, chunk_size) -> None:
    if not isinstance(state, TitansState):
        raise TypeError(f"state: expected a TitansState, got {type(state).__name__}")
    if (momentum is None) != (state.momenta is None):
        made, used = (
            "with" if has else "without"
            for has in (state.momenta is not None, momentum is not None)
        )
        raise ValueError(
            f"state: expected one made {used} momentum, like this call, got one made {made}"
        )
    for name in ("weights", "momenta", "anchor"):
        matrices = getattr(state, name)
        if matrices is None and name == "momenta":
            continue
        if not isinstance(matrices, tuple | list) or len(matrices) != 1:
            raise ValueError(
                f"state.{name}: expected a tuple of 1 tensor (linear memory), got {matrices!r:.80}"
            )
        _check.tensor(f"state.{name}[0]", matrices[0], accumulation, device)
        _check.shape(f"state.{name}[0]", matrices[0], shape, "B H D D_v")
    _check.tensor("state.position", state.position, (torch.int64,), device)
    _check.shape("state.position", state.position, shape[:1], "B")
    _check.positive("state.chunk_size", state.chunk_size)
    if state.chunk_size == chunk_size:
        return
    # The one case that looks at values on the device; a traced graph has none and refuses.
    traced = torch.compiler.is_compiling()
    if (
        traced
        or ((state.position % chunk_size != 0) | (state.position % state.chunk_size != 0)).any()
    ):
        raise ValueError(
            f"chunk_size: expected {state.chunk_size}, that of the state, which is inside a chunk"
            f"{' (or may be: traced code cannot tell)' if traced else ''}, got {chunk_size}"
        )


def _chunks_per_checkpoint(q: Tensor, v: Tensor, chunk_size: int, has_momentum: bool) -> int:
    """Chunks between kept states, for the backward: as few as take no more memory than q, k, v."""
    key, value = q.shape[3], v.shape[3]
    accumulation = 8 if q.dtype == torch.float64 else 4
    state = key * value * (2 if has_momentum else 1) * accumulation
    rows_of_chunk = chunk_size * (2 * key + value) * q.element_size()
    return max(1, -(-state // max(1, rows_of_chunk)))


# ---- fake kernels and autograd ------------------------------------------------------------------


def _fake_forward(
    q,
    k,
    v,
    lr,
    momentum,
    decay,
    weights,
    momenta,
    anchor,
    position,
    cu_seqlens,
    chunk_size,
    objective,
    read,
    every,
):
    o = q.new_empty((*q.shape[:3], v.shape[3]))
    momenta_out = weights.new_empty(weights.shape if momentum is not None else (0,))
    checkpoints = weights.new_empty((0,))
    if every > 0:
        slots = q.shape[0] * q.shape[1] // (chunk_size * every) + weights.shape[0]
        checkpoints = weights.new_empty(
            (slots, weights.shape[1], 1 if momentum is None else 2, *weights.shape[2:])
        )
    return (
        o,
        weights.new_empty(weights.shape),
        momenta_out,
        weights.new_empty(weights.shape),
        checkpoints,
    )


def _fake_backward(
    d_o, d_weights, d_momenta, d_anchor, q, k, v, lr, momentum, decay, weights, momenta, anchor,
    position, cu_seqlens,
    checkpoints, chunk_size, objective, read, every,
):  # fmt: skip
    def like(x):
        return lr.new_empty((0,)) if x is None else x.new_empty(x.shape)

    return tuple(like(x) for x in (q, k, v, lr, momentum, decay, weights, momenta, anchor))


def _setup_context(ctx, inputs, output):
    *tensors, chunk_size, objective, read, every = inputs
    if every == 0:
        raise RuntimeError("hope::titans_linear: differentiating needs checkpoint_every > 0")
    ctx.save_for_backward(*tensors, output[4])
    ctx.options = (chunk_size, objective, read, every)
    ctx.set_materialize_grads(False)


def _backward(operator, ctx, d_o, d_weights, d_momenta, d_anchor, _):
    *tensors, checkpoints = ctx.saved_tensors
    if ctx.options[-1] == 0 or all(x is None for x in (d_o, d_weights, d_momenta, d_anchor)):
        return (None,) * 15
    momentum = tensors[4]
    gradients = operator(
        d_o,
        d_weights,
        None if momentum is None else d_momenta,
        d_anchor,
        *tensors,
        checkpoints,
        *ctx.options,
    )
    present = [None if x is None else g for x, g in zip(tensors[:9], gradients, strict=True)]
    return (*present, *(None,) * 6)


def _no_double_backward(ctx, *_):
    raise RuntimeError(
        "titans_memory: double backward (a gradient of its gradient) is not supported"
    )


def _register(library: str) -> None:
    forward, backward = f"{library}::titans_linear", f"{library}::titans_linear_backward"
    differentiate = partial(_backward, getattr(torch.ops, library).titans_linear_backward)
    torch.library.register_fake(forward, _fake_forward)
    torch.library.register_fake(backward, _fake_backward)
    torch.library.register_autograd(forward, differentiate, setup_context=_setup_context)
    torch.library.register_autograd(backward, _no_double_backward)


_load.register(_register)
