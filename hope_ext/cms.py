"""The continuum memory system: public functions and their checks.

Fake kernels and autograd are in _cms_autograd.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils import _pytree

from hope_ext import _check, _cms_autograd, _load
from hope_ext.reference import cms as reference

OBJECTIVES = ("l2", "dot", "teach")
CUDA_SIZES = 16  # D and F are multiples of it there


@dataclass(frozen=True)
class CmsState:
    """What a level of the continuum memory system carries from call to call.

    Attributes:
        weights: (W1 [B, D, F], W2 [B, F, D]) (with packed sequences, B is their number).
        pending: the gradient of the current chunk's tokens so far, weighted with their learning
        rates, of the same shapes; zero at a chunk boundary.
        position: int64 [B], the tokens seen.
        chunk_size: the chunk size that `position` and `pending` refer to; None: any call's.
    """

    weights: tuple[Tensor, Tensor]
    pending: tuple[Tensor, Tensor]
    position: Tensor
    chunk_size: int | None = None

    def _map(self, function: Callable[[Tensor], Tensor]) -> CmsState:
        return replace(
            self,
            weights=tuple(map(function, self.weights)),
            pending=tuple(map(function, self.pending)),
            position=function(self.position),
        )

    def detach(self) -> CmsState:
        """The same state, cut off from the graph that made it: truncates the outer gradient."""
        return self._map(Tensor.detach)

    def to(self, device: torch.device | str) -> CmsState:
        """The same state on another device."""
        return self._map(lambda x: x.to(device))


_pytree.register_pytree_node(
    CmsState,
    lambda state: ([state.weights, state.pending, state.position], state.chunk_size),
    lambda leaves, chunk_size: CmsState(*leaves, chunk_size),
    serialized_type_name="hope_ext.CmsState",
)


def cms_memory(
    x: Tensor,
    weights: Sequence[Tensor],
    lr: Tensor,
    target: Tensor,
    *,
    state: CmsState | None = None,
    chunk_size: int = 512,
    activation: str = "gelu",
    objective: str = "l2",
    decay: float = 0.0,
    residual: bool = True,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, CmsState]:
    """One level of the continuum memory system: an MLP that is rewritten after every chunk of
    tokens by the chunk's gradient (Nested Learning, arXiv 2512.24695, eqs. 70-71).

    With the weights of the chunk that token t is in,

        y_t = x_t + act(x_t W1) W2
        e_t = y_t - target_t ("l2")  or  -target_t ("dot")  or  target_t ("teach")

    and when the chunk is complete, with dW_t the gradient at the chunk's weights of a loss whose
    gradient at y_t is e_t (for l2: 1/2 |y_t - target_t|^2, for dot: -<y_t, target_t>),

        W <- (1 - decay) W - sum over the chunk's tokens of lr_t dW_t        for W1 and W2

    A partial last chunk is read and not learned; its gradient so far is in the state. Every
    sequence has fast weights of its own, which start from `weights`.

    Gradients flow to every floating-point input, through all updates and a carried state; they are
    exact. There is no double backward.

    Args:
        x: tokens [B, T, D]; float32, bfloat16 or float16 (float64 on the CPU).
        weights: (W1 [D, F], W2 [F, D]), float32 (float64 with float64 tokens): where every
            sequence's memory starts.
        lr: learning rates [B, T], of the weights' dtype.
        target: [B, T, D], of x's dtype: what y is to become ("l2", "dot"), or the error itself
            ("teach"), such as the outer loss's gradient at the output.
        state: the state returned by an earlier call; the memory goes on from there and `weights` is
            not used. Any split of a sequence, single tokens included, gives what one call gives.
        chunk_size: tokens per chunk, counted from the start of the sequence.
        activation: "gelu" (its tanh approximation) or "silu".
        objective: see above.
        decay: what the weights lose at every update, in [0, 1].
        residual: False leaves out the `x_t +`.
        cu_seqlens: int32 [N + 1], the bounds of N sequences packed into one row (B = 1); each
            starts anew from `weights`, or from its row of `state`.
        return_state: also return the state after the last token. Without it a last chunk is not
            learned at all, complete or not.

    Returns:
        y [B, T, D] in x's dtype; with `return_state`, (y, CmsState).

    Under `torch.autocast` x and target are cast to the autocast dtype, weights and lr to float32.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. On CUDA, D and
            F are multiples of 16.

    The stability of the inner loop is the caller's concern: a chunk's gradients are all taken at
    its start and add up, so a learning rate has to shrink with the chunk's tokens and with |x|^2.
    """
    x, target = _cast_rows(x), _cast_rows(target, x)
    weights, lr = _cast_wide(weights, x), _cast_wide(lr, x)
    _check_rows(x)
    _check_options(activation, objective, decay, residual)
    level = _Level(weights, lr, target, state, chunk_size, lambda name: name)
    sequences = len(x) if cu_seqlens is None else _check.cu_seqlens(cu_seqlens, x, "x")
    level.check(x, sequences)
    options = (activation, objective, float(decay), residual)
    y, after = level.run(x, cu_seqlens, sequences, options, return_state)
    return (y, after) if return_state else y


def cms_chain(
    x: Tensor,
    levels: Sequence[Sequence[Tensor]],
    lrs: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    chunk_sizes: Sequence[int],
    states: Sequence[CmsState | None] | None = None,
    activation: str = "gelu",
    objective: str = "l2",
    decay: float = 0.0,
    residual: bool = True,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, tuple[CmsState, ...]]:
    """Levels of the continuum memory system in a row, from the one that is rewritten most often to
    the one that changes slowest (Nested Learning, arXiv 2512.24695, eqs. 70-71).

    It is `cms_memory` level after level, each reading what the previous one gives:

        y = M_k(... M_2(M_1(x)))            M_i rewritten every chunk_sizes[i] tokens

    Args:
        x: tokens [B, T, D]; float32, bfloat16 or float16 (float64 on the CPU).
        levels: the (W1 [D, F], W2 [F, D]) of each level, at least one; F may differ.
        lrs: learning rates [B, T] of each level.
        targets: [B, T, D] of each level.
        chunk_sizes: of each level, none smaller than the one before it.
        states: those returned by an earlier call, one for each level; None, or None among them,
            starts from the level's weights.
        activation, objective, decay, residual, cu_seqlens: as in `cms_memory`, for all levels.
        return_state: also return the states after the last token.

    Returns:
        y [B, T, D] in x's dtype; with `return_state`, (y, a CmsState for each level).

    Raises:
        TypeError, ValueError: like `cms_memory`, before any work is done, naming the level:
            "lrs[1]: expected ...".
    """
    x = _cast_rows(x)
    _check_rows(x)
    _check_options(activation, objective, decay, residual)
    sequences = len(x) if cu_seqlens is None else _check.cu_seqlens(cu_seqlens, x, "x")
    chain = _chain(x, levels, lrs, targets, states, chunk_sizes)
    for level in chain:
        level.check(x, sequences)
    options, after = (activation, objective, float(decay), residual), []
    for level in chain:
        x, state = level.run(x, cu_seqlens, sequences, options, return_state)
        after.append(state)
    return (x, tuple(after)) if return_state else x


@dataclass(frozen=True)
class _Level:
    """The arguments that a level has to itself; `name` says what the caller calls them."""

    weights: Sequence[Tensor]
    lr: Tensor
    target: Tensor
    state: CmsState | None
    chunk_size: int
    name: Callable[[str], str]

    def check(self, x: Tensor, sequences: int) -> None:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        _check_weights(self.name("weights"), self.weights, x, wide)
        if _load.runs_cuda_kernels(x):
            _check_cuda_sizes(self.name("weights"), self.weights[0], x)
        name = self.name("lr")
        _check.tensor(name, self.lr, (wide,), x.device, like="x")
        _check.shape(name, self.lr, x.shape[:2], "B T")
        name = self.name("target")
        _check.tensor(name, self.target, (x.dtype,), x.device, like="x")
        _check.shape(name, self.target, x.shape, "B T D")
        _check.positive(self.name("chunk_size"), self.chunk_size)
        if self.state is not None:
            self._check_state(sequences)

    def _check_state(self, sequences: int) -> None:
        state, where = self.state, self.name("state")
        if not isinstance(state, CmsState):
            raise TypeError(f"{where}: expected a CmsState, got {type(state).__name__}")
        for part in ("weights", "pending"):
            matrices, name = getattr(state, part), f"{where}.{part}"
            if not isinstance(matrices, tuple | list) or len(matrices) != 2:
                raise ValueError(f"{name}: expected a tuple of 2 tensors, got {matrices!r:.80}")
            for i, letters in enumerate(("B D F", "B F D")):
                w, matrix = self.weights[i], matrices[i]
                _check.tensor(f"{name}[{i}]", matrix, (w.dtype,), w.device, like="x")
                _check.shape(f"{name}[{i}]", matrix, (sequences, *w.shape), letters)
        device = self.weights[0].device
        _check.tensor(f"{where}.position", state.position, (torch.int64,), device, like="x")
        _check.shape(f"{where}.position", state.position, (sequences,), "B")
        if state.chunk_size is not None:
            name = self.name("chunk_size")
            _check.chunk_size_of_state(
                state.chunk_size, state.position, self.chunk_size, where, name
            )

    def run(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None,
        sequences: int,
        options: tuple,
        return_state: bool,
    ) -> tuple[Tensor, CmsState | None]:
        """y, and the state after the last token if it is wanted."""
        if self.state is None:
            start = [w.expand(sequences, *w.shape) for w in self.weights]
            pending, position = [None, None], None
        else:
            start, pending, position = self.state.weights, self.state.pending, self.state.position
        tensors = (x, self.target, self.lr, *start, *pending, position, cu_seqlens)
        options = (self.chunk_size, *options)
        if _load.use_reference():
            y, *after = reference.cms(*tensors, *options)
        else:
            trains = torch.is_grad_enabled() and any(
                tensor is not None and tensor.requires_grad for tensor in tensors
            )
            every = _chunks_per_checkpoint(x.shape[1], self.chunk_size) if trains else 0
            y, *after, _ = _load.operators().cms(*tensors, *options, return_state, every)
        if not return_state:
            return y, None
        lengths = x.shape[1] if cu_seqlens is None else cu_seqlens.diff().long()
        if position is None:
            position = torch.zeros(sequences, dtype=torch.int64, device=x.device)
        return y, CmsState(
            weights=tuple(after[:2]),
            pending=tuple(after[2:]),
            position=position + lengths,
            chunk_size=self.chunk_size,
        )


def _chunks_per_checkpoint(tokens: int, chunk_size: int) -> int:
    """Chunks between kept weights, for the backward: about the square root of their number.

    Then the forward keeps about as many weights as the backward computes again at a time, and their
    sum is smallest.
    """
    every = 1
    while every * every * chunk_size < tokens:  # of a traced length there is no square root
        every += 1
    return every


def _chain(x, levels, lrs, targets, states, chunk_sizes) -> list[_Level]:
    """The arguments of each level, checked to be equally many."""
    for name, given in (("levels", levels), ("lrs", lrs), ("targets", targets)):
        if not isinstance(given, tuple | list):
            raise TypeError(
                f"{name}: expected a sequence with one entry for each level, "
                f"got {type(given).__name__}"
            )
    if len(levels) == 0:
        raise ValueError("levels: expected at least one level, got none")
    states = [None] * len(levels) if states is None else states
    for name, given in (
        ("lrs", lrs), ("targets", targets), ("chunk_sizes", chunk_sizes), ("states", states)
    ):  # fmt: skip
        if not isinstance(given, tuple | list) or len(given) != len(levels):
            came = f"{len(given)}" if isinstance(given, tuple | list) else repr(given)[:80]
            raise ValueError(f"{name}: expected {len(levels)} entries, like levels, got {came}")
    chain = []
    for i, (weights, lr, target, state, chunk_size) in enumerate(
        zip(levels, lrs, targets, states, chunk_sizes, strict=True)
    ):
        _check.positive(f"chunk_sizes[{i}]", chunk_size)
        if i and chunk_size < chunk_sizes[i - 1]:
            raise ValueError(
                f"chunk_sizes[{i}]: expected at least {chunk_sizes[i - 1]}, that of the level "
                f"before it, got {chunk_size}"
            )

        def name(part: str, i: int = i) -> str:
            return f"levels[{i}]" if part == "weights" else f"{part}s[{i}]"

        target, weights, lr = _cast_rows(target, x), _cast_wide(weights, x), _cast_wide(lr, x)
        chain.append(_Level(weights, lr, target, state, chunk_size, name))
    return chain


def _autocasts(x: object) -> bool:
    # The meta device knows no autocast.
    return isinstance(x, Tensor) and not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _cast_rows(rows: object, like: object = None) -> object:
    """To the autocast dtype of `like`'s device (`rows`' own without it), where it is enabled."""
    like = rows if like is None else like
    return _cast(rows, torch.get_autocast_dtype(like.device.type)) if _autocasts(like) else rows


def _cast_wide(tree: object, like: object) -> object:
    """The floating-point tensors to float32, where autocast is enabled on `like`'s device."""
    if not _autocasts(like):
        return tree
    return _pytree.tree_map(lambda w: _cast(w, torch.float32), tree)


def _cast(x: object, to: torch.dtype) -> object:
    wanted = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(to) if wanted else x


def _check_rows(x: object) -> None:
    _check.tensor("x", x, _check.ROW_DTYPES)
    _check.dimensions("x", x, "B T D")


def _check_options(activation: object, objective: object, decay: object, residual: object) -> None:
    _check.choice("activation", activation, ("gelu", "silu"))
    _check.choice("objective", objective, OBJECTIVES)
    _check.number("decay", decay)
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: expected a number from 0 to 1, got {decay}")
    if not isinstance(residual, bool):
        raise TypeError(f"residual: expected a bool, got {residual!r:.80}")


def _check_weights(name: str, weights: object, x: Tensor, wide: torch.dtype) -> None:
    if not isinstance(weights, tuple | list):
        raise TypeError(
            f"{name}: expected a tuple (W1, W2) of tensors, got {type(weights).__name__}"
        )
    if len(weights) != 2:
        raise ValueError(f"{name}: expected (W1 [D, F], W2 [F, D]), got a tuple of {len(weights)}")
    for i, w in enumerate(weights):
        _check.tensor(f"{name}[{i}]", w, (wide,), x.device, like="x")
    dim = x.shape[2]
    _check.dimensions(f"{name}[0]", weights[0], "D F")
    hidden = weights[0].shape[1]
    _check.shape(f"{name}[0]", weights[0], (dim, max(hidden, 1)), "D F")
    _check.shape(f"{name}[1]", weights[1], (hidden, dim), "F D")


def _check_cuda_sizes(name: str, w1: Tensor, x: Tensor) -> None:
    if x.dtype == torch.float64:
        raise TypeError("x: expected float32, bfloat16 or float16 on CUDA, got float64")
    (dim, hidden), step = w1.shape, CUDA_SIZES
    if dim % step:
        raise ValueError(f"x: expected a size D that is a multiple of {step} on CUDA, got {dim}")
    if hidden % step:
        raise ValueError(
            f"{name}: expected a hidden size that is a multiple of {step} on CUDA, got {hidden}"
        )


_load.register(_cms_autograd.register)
