"""Fake kernels and autograd of `cms`, the operator behind `cms_memory`.

Its arguments, in this order: x, target, lr, the two layers' weights, their pending gradients (or
None), position and cu_seqlens; then the options, the last two of which are whether the final state
is wanted, and the number of chunks from checkpoint to checkpoint.
"""

from functools import partial

import torch

TENSORS, OPTIONS = 9, 7
DIFFERENTIABLE = 7


def _fake_forward(*arguments):
    x, _, _, w1, w2, *_, position, _ = arguments[:TENSORS]
    chunk_size, keeps_state, every = arguments[TENSORS], *arguments[-2:]
    checkpoints = w1.new_empty((0,))
    if every > 0:
        slots = x.shape[0] * x.shape[1] // (chunk_size * every)
        slots += 0 if position is None else w1.shape[0]
        checkpoints = w1.new_empty((slots, w1.shape[1] * w1.shape[2] + w2.shape[1] * w2.shape[2]))
    states = [w.new_empty(w.shape if keeps_state else (0,)) for w in (w1, w2, w1, w2)]
    return x.new_empty(x.shape), *states, checkpoints


def _fake_backward(d_y, d_w1, d_w2, d_p1, d_p2, *arguments):
    tensors = arguments[:DIFFERENTIABLE]
    w1 = tensors[3]
    return tuple(w1.new_empty((0,)) if x is None else x.new_empty(x.shape) for x in tensors)


def _setup_context(ctx, inputs, output):
    if inputs[-1] == 0:
        raise RuntimeError("hope::cms: differentiating needs checkpoint_every > 0")
    ctx.save_for_backward(*inputs[:TENSORS], output[-1])
    ctx.keeps_state = inputs[-2]
    ctx.options = (*inputs[TENSORS:-2], inputs[-1])
    ctx.set_materialize_grads(False)


def _backward(operator, ctx, d_y, d_w1, d_w2, d_p1, d_p2, _):
    gradients = [d_y, d_w1, d_w2, d_p1, d_p2]
    nothing = (None,) * (TENSORS - DIFFERENTIABLE + OPTIONS)
    if not ctx.keeps_state:  # then these belong to empty tensors
        gradients[1:] = [None] * 4
    if all(g is None for g in gradients):
        return (None,) * (TENSORS + OPTIONS)
    inputs = ctx.saved_tensors
    results = operator(*gradients, *inputs, *ctx.options)
    present = [
        None if x is None else gradient
        for x, gradient in zip(inputs[:DIFFERENTIABLE], results, strict=True)
    ]
    return *present, *nothing


def _no_double_backward(ctx, *_):
    raise RuntimeError("cms_memory: double backward (a gradient of its gradient) is not supported")


def register(library: str) -> None:
    forward, backward = f"{library}::cms", f"{library}::cms_backward"
    differentiate = partial(_backward, getattr(torch.ops, library).cms_backward)
    torch.library.register_fake(forward, _fake_forward)
    torch.library.register_fake(backward, _fake_backward)
    torch.library.register_autograd(forward, differentiate, setup_context=_setup_context)
    torch.library.register_autograd(backward, _no_double_backward)
