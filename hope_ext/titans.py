"""The Titans memory's inner gradient step: public function and its checks.

Fake kernels and autograd are in _titans_autograd.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils import _pytree

from hope_ext import _check, _load, _titans_autograd
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
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    objective: str = "l2",
    read: str = "after",
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, TitansState]:
    """A memory that is trained while it is read (Titans, arXiv 2501.00663, eqs. 8-18), chunk by
    chunk.

    The memory M is linear or deep, with a LayerNorm on request (norm="layer"):

        linear   M(x) = x @ W                   with a norm:  M(x) = x + LN(x @ W)
        deep     M(x) = x + act(x @ W1) @ W2    with a norm:  M(x) = x + LN(act(x @ W1) @ W2)

    where residual=False drops the `x +`. For every token t and every weight matrix W, with grad_t
    the gradient of the inner loss at the anchor, the weights at the chunk's start:

        inner loss   1/2 |M_anchor(k_t) - v_t|^2 ("l2")   or   -<M_anchor(k_t), v_t> ("dot")
        S_t = momentum_t * S_{t-1} - lr_t * grad_t          (without momentum: S_t = -lr_t * grad_t)
        W_t = (1 - decay_t) * W_{t-1} + S_t
        o_t = M_{W_t}(q_t) (read "after")  |  M_{W_{t-1}}(q_t) ("before")  |  M_anchor(q_t) "chunk"

    Gradients flow to every floating-point input, through all inner steps and a carried state; they
    are exact for the chunked computation. There is no double backward.

    Args:
        q, k: queries and keys [B, T, H, D]; float32, bfloat16 or float16 (float64 on the CPU), one
            dtype with v.
        v: values [B, T, H, D_v]; a deep or a residual memory needs D_v = D.
        lr: inner learning rates [B, T, H], >= 0, float32 (float64 with float64 rows), like the next
            two.
        weights: the initial memory, of lr's dtype, shared over the batch: `(W,)`, W [H, D, D_v], or
            `(W1, W2)`, W1 [H, D, F], W2 [H, F, D].
        momentum: [B, T, H] in [0, 1], or None.
        decay: how much is forgotten before a token is learned, [B, T, H] in [0, 1], or None.
        state: the state returned by an earlier call; the memory goes on from there and `weights` is
            not used. Any split of a sequence, single tokens included, gives what one call gives.
        chunk_size: tokens per chunk, counted from the start of the sequence.
        activation: of a deep memory: "gelu" (its tanh approximation) or "silu".
        residual: whether M adds its input; a linear memory without a norm never does.
        norm: None or "layer", a LayerNorm over the last dimension. The inner loss's gradient goes
            through it, but the inner steps do not rewrite its weight and bias.
        norm_weight, norm_bias: [H, D_v], of lr's dtype; None: ones and zeros.
        norm_eps: added to the variance.
        objective, read: see above.
        cu_seqlens: int32 [N + 1], the bounds of N sequences packed into one row (B = 1); each
            starts anew from `weights`, or from its row of `state`.
        return_state: also return the state after the last token.

    Returns:
        o [B, T, H, D_v] in q's dtype; with `return_state`, (o, TitansState).

    Under `torch.autocast` q, k and v are cast to the autocast dtype, gates, weights and norm to
    float32.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    The stability of the inner loop is the caller's concern: with a linear memory and unit keys that
    repeat it is stable for about chunk_size * lr / (1 - momentum) < 2.
    """
    # The meta device knows no autocast.
    if isinstance(q, Tensor) and not q.is_meta and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = _cast((q, k, v), dtype)
        lr, momentum, decay, norm_weight, norm_bias = _cast(
            (lr, momentum, decay, norm_weight, norm_bias), torch.float32
        )
        if isinstance(weights, tuple):
            weights = _cast(weights, torch.float32)
    _check_tokens(q, k, v, lr, momentum, decay)
    _check_memory(q, v, lr, weights, residual, norm, norm_weight, norm_bias, norm_eps)
    _check.positive("chunk_size", chunk_size)
    _check.choice("activation", activation, ("gelu", "silu"))
    _check.choice("objective", objective, ("l2", "dot"))
    _check.choice("read", read, ("after", "before", "chunk"))
    sequences = len(q) if cu_seqlens is None else _check.cu_seqlens(cu_seqlens, q)
    if state is not None:
        _check_state(state, sequences, weights, momentum, chunk_size)

    norms: tuple[Tensor | None, ...] = (None, None)
    if norm is not None:
        given = weights[0].new_ones(v.shape[2:]) if norm_weight is None else norm_weight
        norms = (given, torch.zeros_like(given) if norm_bias is None else norm_bias)
        norms = tuple(x.expand(sequences, *x.shape) for x in norms)
    if state is None:
        start = tuple(w.expand(sequences, *w.shape) for w in weights)
        momenta = anchor = position = None
    else:
        start, momenta, anchor, position = (
            state.weights, state.momenta, state.anchor, state.position
        )  # fmt: skip
    matrices = (*_of_two(start), *_of_two(momenta), *_of_two(anchor))
    tensors = (q, k, v, lr, momentum, decay, *matrices, *norms, position, cu_seqlens)
    options = (chunk_size, activation, residual, objective, read, float(norm_eps))
    if _load.use_reference():
        o, *final = reference.titans(*tensors, *options)
    else:
        trains = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in tensors[:14]
        )
        every = _chunks_per_checkpoint(q, v, start, chunk_size, momentum is not None)
        o, *final, _ = _load.operators().titans(*tensors, *options, every if trains else 0)
    if not return_state:
        return o
    lengths = q.shape[1] if cu_seqlens is None else cu_seqlens.diff().long()
    before = (
        torch.zeros(sequences, dtype=torch.int64, device=q.device) if position is None else position
    )
    layers = len(start)
    return o, TitansState(
        weights=tuple(final[0:2][:layers]),
        momenta=None if momentum is None else tuple(final[2:4][:layers]),
        anchor=tuple(final[4:6][:layers]),
        position=before + lengths,
        chunk_size=chunk_size,
    )


def _of_two(matrices: tuple[Tensor, ...] | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if matrices is None else (*matrices, None)[:2]


def _cast(tensors: tuple, to: torch.dtype) -> tuple:
    return tuple(
        x.to(to)
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        else x
        for x in tensors
    )


def _check_tokens(q, k, v, lr, momentum, decay) -> None:
    _check.tensor("q", q, _check.ROW_DTYPES)
    _check.dimensions("q", q, "B T H D")
    for name, x in (("k", k), ("v", v)):
        _check.tensor(name, x, (q.dtype,), q.device)
    _check.shape("k", k, q.shape, "B T H D")
    _check.dimensions("v", v, "B T H D_v")
    _check.shape("v", v, (*q.shape[:3], v.shape[3]), "B T H D_v")
    accumulation = (torch.float64 if q.dtype == torch.float64 else torch.float32,)
    for name, x in (("lr", lr), ("momentum", momentum), ("decay", decay)):
        if x is not None or name == "lr":
            _check.tensor(name, x, accumulation, q.device)
            _check.shape(name, x, q.shape[:3], "B T H")


def _check_memory(q, v, lr, weights, residual, norm, norm_weight, norm_bias, norm_eps) -> None:
    heads, key, value = q.shape[2], q.shape[3], v.shape[3]
    if not isinstance(weights, tuple | list):
        raise TypeError(
            f"weights: expected a tuple (W,) or (W1, W2) of tensors, got {type(weights).__name__}"
        )
    if len(weights) not in (1, 2):
        raise ValueError(
            "weights: expected a linear memory (W,), W [H, D, D_v], or a deep one (W1, W2), "
            f"W1 [H, D, F], W2 [H, F, D], got a tuple of {len(weights)}"
        )
    for i, w in enumerate(weights):
        _check.tensor(f"weights[{i}]", w, (lr.dtype,), q.device)
    if len(weights) == 1:
        _check.shape("weights[0]", weights[0], (heads, key, value), "H D D_v")
    else:
        _check.dimensions("weights[0]", weights[0], "H D F")
        hidden = weights[0].shape[2]
        _check.shape("weights[0]", weights[0], (heads, key, max(hidden, 1)), "H D F")
        _check.shape("weights[1]", weights[1], (heads, hidden, key), "H F D")
    if not isinstance(residual, bool):
        raise TypeError(f"residual: expected a bool, got {residual!r}")
    _check.choice("norm", norm, (None, "layer"))
    deep = len(weights) == 2
    if value != key and (deep or (residual and norm is not None)):
        what = "a deep memory" if deep else "residual=True with a norm"
        raise ValueError(f"v: expected D_v = D = {key} for {what}, got D_v = {value}")
    for name, x in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if x is None:
            continue
        if norm is None:
            raise ValueError(f"{name}: expected None without a norm, got {type(x).__name__}")
        _check.tensor(name, x, (lr.dtype,), q.device)
        _check.shape(name, x, (heads, value), "H D_v")
    _check.number("norm_eps", norm_eps)
    if not 0 < norm_eps < float("inf"):
        raise ValueError(f"norm_eps: expected a positive number, got {norm_eps}")


def _check_state(state, sequences, weights, momentum, chunk_size) -> None:
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
        if not isinstance(matrices, tuple | list) or len(matrices) != len(weights):
            tensors = "1 tensor" if len(weights) == 1 else "2 tensors"
            raise ValueError(
                f"state.{name}: expected a tuple of {tensors}, like weights, got {matrices!r:.80}"
            )
        for i, (matrix, like) in enumerate(zip(matrices, weights, strict=True)):
            letters = "B H D D_v" if len(weights) == 1 else ("B H D F", "B H F D")[i]
            _check.tensor(f"state.{name}[{i}]", matrix, (like.dtype,), like.device)
            _check.shape(f"state.{name}[{i}]", matrix, (sequences, *like.shape), letters)
    _check.tensor("state.position", state.position, (torch.int64,), weights[0].device)
    _check.shape("state.position", state.position, (sequences,), "B")
    _check.chunk_size_of_state(state.chunk_size, state.position, chunk_size)


def _chunks_per_checkpoint(
    q: Tensor, v: Tensor, weights: tuple[Tensor, ...], chunk_size: int, has_momentum: bool
) -> int:
    """Chunks between kept states, for the backward: as few as take no more memory than q, k, v."""
    elements = sum(w.shape[-2] * w.shape[-1] for w in weights) * (2 if has_momentum else 1)
    rows_of_chunk = chunk_size * (2 * q.shape[3] + v.shape[3]) * q.element_size()
    return max(1, -(-elements * weights[0].element_size() // max(1, rows_of_chunk)))


_load.register(_titans_autograd.register)
