"""Fake kernels and autograd of `selfmod`, the operator behind `self_modifying_memory`.

Its arguments, in this order: x, q, the list of all memories' weights, the two biases, the list of
their anchors (empty: none), position and cu_seqlens; then the options, the last of which is the
number of chunks from checkpoint to checkpoint.
"""

from functools import partial

import torch

TENSORS, OPTIONS = 8, 6


def _fake_forward(*arguments):
    x, q, weights = arguments[:3]
    chunk_size, every = arguments[TENSORS], arguments[-1]
    like = weights[0]
    checkpoints = like.new_empty((0,))
    if every > 0:
        size = sum(w.shape[2] * w.shape[3] for w in weights)
        slots = x.shape[0] * x.shape[1] // (chunk_size * every) + like.shape[0]
        checkpoints = like.new_empty((slots, x.shape[2], size))
    states = [[w.new_empty(w.shape) for w in weights] for _ in ("weights", "anchor")]
    return q.new_empty(q.shape), *states, checkpoints


def _fake_backward(d_o, d_weights, d_anchor, *arguments):
    x, q, weights, lr_bias, retention_bias, anchor = arguments[:6]

    def empty(tensor):
        return tensor.new_empty(tensor.shape)

    biases = (empty(lr_bias), empty(retention_bias))
    return empty(x), empty(q), [empty(w) for w in weights], *biases, [empty(a) for a in anchor]


def _setup_context(ctx, inputs, output):
    if inputs[-1] == 0:
        raise RuntimeError("hope::selfmod: differentiating needs checkpoint_every > 0")
    x, q, weights, lr_bias, retention_bias, anchor, position, cu_seqlens = inputs[:TENSORS]
    ctx.matrices = len(weights)
    ctx.save_for_backward(
        x, q, lr_bias, retention_bias, position, cu_seqlens, output[-1], *weights, *anchor
    )
    ctx.options = inputs[TENSORS:]
    ctx.set_materialize_grads(False)


def _backward(operator, ctx, d_o, d_weights, d_anchor, _):
    x, q, lr_bias, retention_bias, position, cu_seqlens, checkpoints, *saved = ctx.saved_tensors
    weights, anchor = saved[: ctx.matrices], saved[ctx.matrices :]
    nothing = (None,) * OPTIONS
    if all(g is None for g in (d_o, *d_weights, *d_anchor)):
        of_weights, of_anchor = [None] * len(weights), [None] * len(anchor)
        return None, None, of_weights, None, None, of_anchor, None, None, *nothing
    tensors = (x, q, weights, lr_bias, retention_bias, anchor, position, cu_seqlens, checkpoints)
    *d_rows, d_start, d_lr_bias, d_retention_bias, d_first_anchor = operator(
        d_o, _of_all(d_weights, weights), _of_all(d_anchor, weights), *tensors, *ctx.options
    )
    return *d_rows, d_start, d_lr_bias, d_retention_bias, d_first_anchor, None, None, *nothing


def _of_all(gradients, matrices):
    """A gradient for each matrix, or for none."""
    if all(g is None for g in gradients):
        return []
    return [
        torch.zeros_like(matrix) if g is None else g
        for g, matrix in zip(gradients, matrices, strict=True)
    ]


def _no_double_backward(ctx, *_):
    raise RuntimeError(
        "self_modifying_memory: double backward (a gradient of its gradient) is not supported"
    )


def register(library: str) -> None:
    forward, backward = f"{library}::selfmod", f"{library}::selfmod_backward"
    differentiate = partial(_backward, getattr(torch.ops, library).selfmod_backward)
    torch.library.register_fake(forward, _fake_forward)
    torch.library.register_fake(backward, _fake_backward)
    torch.library.register_autograd(forward, differentiate, setup_context=_setup_context)
    torch.library.register_autograd(backward, _no_double_backward)
