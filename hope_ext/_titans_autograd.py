"""Fake kernels and autograd of `titans`, the operator behind `titans_memory`.

Its tensors, in this order: q, k, v, lr, momentum, decay, the weights, momenta and anchors of the
memory's one or two layers, the norm's weight and bias; then position and cu_seqlens, and the
options, the last of which is the number of chunks from checkpoint to checkpoint.
"""

from functools import partial

import torch

DIFFERENTIABLE, TENSORS, OPTIONS = 14, 16, 7


def _fake_forward(*arguments):
    q, _, v, lr, momentum, _, w1, w2 = arguments[:8]
    chunk_size, every = arguments[TENSORS], arguments[-1]

    def like(w, wanted=True):
        return lr.new_empty(w.shape if wanted and w is not None else (0,))

    checkpoints = lr.new_empty((0,))
    if every > 0:
        size = sum(w.shape[2] * w.shape[3] for w in (w1, w2) if w is not None)
        slots = q.shape[0] * q.shape[1] // (chunk_size * every) + w1.shape[0]
        checkpoints = lr.new_empty((slots, q.shape[2], size * (1 if momentum is None else 2)))
    moves = momentum is not None
    states = (like(w1), like(w2), like(w1, moves), like(w2, moves), like(w1), like(w2))
    return q.new_empty((*q.shape[:3], v.shape[3])), *states, checkpoints


def _fake_backward(*arguments):
    tensors = arguments[7 : 7 + DIFFERENTIABLE]
    lr = tensors[3]
    return tuple(lr.new_empty((0,)) if x is None else x.new_empty(x.shape) for x in tensors)


def _setup_context(ctx, inputs, output):
    if inputs[-1] == 0:
        raise RuntimeError("hope::titans: differentiating needs checkpoint_every > 0")
    ctx.save_for_backward(*inputs[:TENSORS], output[-1])
    ctx.options = inputs[TENSORS:]
    ctx.set_materialize_grads(False)


def _backward(operator, ctx, d_o, *d_states):
    *tensors, checkpoints = ctx.saved_tensors
    *d_states, _ = d_states  # of the checkpoints
    nothing = (None,) * (TENSORS + OPTIONS)
    if ctx.options[-1] == 0 or all(x is None for x in (d_o, *d_states)):
        return nothing
    # Outputs that are there for form alone, of 0 elements, have no gradient to speak of.
    d_states = [None if x is None or x.dim() == 1 else x for x in d_states]
    gradients = operator(d_o, *d_states, *tensors, checkpoints, *ctx.options)
    present = [
        None if x is None else gradient
        for x, gradient in zip(tensors[:DIFFERENTIABLE], gradients, strict=True)
    ]
    return (*present, *nothing[DIFFERENTIABLE:])


def _no_double_backward(ctx, *_):
    raise RuntimeError(
        "titans_memory: double backward (a gradient of its gradient) is not supported"
    )


def register(library: str) -> None:
    forward, backward = f"{library}::titans", f"{library}::titans_backward"
    differentiate = partial(_backward, getattr(torch.ops, library).titans_backward)
    torch.library.register_fake(forward, _fake_forward)
    torch.library.register_fake(backward, _fake_backward)
    torch.library.register_autograd(forward, differentiate, setup_context=_setup_context)
    torch.library.register_autograd(backward, _no_double_backward)
