"""The short causal convolution: public function, fake kernels, autograd."""

from functools import partial

import torch
from torch import Tensor

from hope_ext import _check, _load
from hope_ext.reference import conv as reference

WIDEST = 64


def causal_conv(
    x: Tensor,
    weight: Tensor,
    *,
    tail: Tensor | None = None,
    activation: str = "none",
    cu_seqlens: Tensor | None = None,
    return_tail: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A causal convolution over the last K tokens of each channel, with its activation.

        y_t = activation(sum over k of weight[:, k] * x_{t + k - (K - 1)})

    This is what Titans, HOPE and other recurrent models put between the projections and the memory,
    usually with K = 4. Sums are float32. Gradients flow to x, weight and tail.

    Args:
        x: [B, T, C]; float32, bfloat16 or float16 (float64 on the CPU).
        weight: [C, K], float32 (float64 with float64 x), K at most 64; the last tap is the token.
        tail: the inputs before the first token, [B, K - 1, C] in x's dtype; None: zeros. With
            packed sequences B is their number.
        activation: "none" or "silu".
        cu_seqlens: int32 [N + 1], the bounds of N sequences packed into one row (B = 1), each of
            which starts anew.
        return_tail: also return the last K - 1 inputs, the `tail` of a call that goes on.

    Returns:
        y [B, T, C] in x's dtype; with `return_tail`, (y, tail).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check_arguments(x, weight, tail, activation, cu_seqlens)
    arguments = (x, weight, tail, cu_seqlens, activation)
    if _load.use_reference():
        y, last = reference.conv(*arguments)
    else:
        y, last = _load.operators().conv(*arguments)
    return (y, last) if return_tail else y


def _check_arguments(x, weight, tail, activation, cu_seqlens) -> None:
    _check.tensor("x", x, _check.ROW_DTYPES)
    _check.dimensions("x", x, "B T C")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    _check.tensor("weight", weight, (wide,), x.device, like="x")
    _check.dimensions("weight", weight, "C K")
    channels, width = x.shape[2], weight.shape[1]
    _check.shape("weight", weight, (channels, width), "C K")
    if not 1 <= width <= WIDEST:
        raise ValueError(f"weight: expected [C, K] with K from 1 to {WIDEST}, got K = {width}")
    _check.choice("activation", activation, ("none", "silu"))
    sequences = x.shape[0]
    if cu_seqlens is not None:
        sequences = _check.cu_seqlens(cu_seqlens, x, "x")
    if tail is not None:
        _check.tensor("tail", tail, (x.dtype,), x.device, like="x")
        _check.shape("tail", tail, (sequences, width - 1, channels), "B K-1 C")


# ---- fake kernels and autograd -------------------------------------------------------------------


def _fake_forward(x, weight, tail, cu_seqlens, activation):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty((sequences, weight.shape[1] - 1, x.shape[2]))


def _fake_backward(d_y, d_tail, x, weight, tail, cu_seqlens, activation):
    d_tail = x.new_empty((0,) if tail is None else tail.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), d_tail


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(operator, ctx, d_y, d_tail):
    x, weight, tail, cu_seqlens = ctx.saved_tensors
    if d_y is None and d_tail is None:
        return (None,) * 5
    d_x, d_weight, d_first = operator(d_y, d_tail, x, weight, tail, cu_seqlens, ctx.activation)
    return d_x, d_weight, None if tail is None else d_first, None, None


def _no_double_backward(ctx, *_):
    raise RuntimeError("causal_conv: double backward (a gradient of its gradient) is not supported")


def _register(library: str) -> None:
    forward, backward = f"{library}::conv", f"{library}::conv_backward"
    differentiate = partial(_backward, getattr(torch.ops, library).conv_backward)
    torch.library.register_fake(forward, _fake_forward)
    torch.library.register_fake(backward, _fake_backward)
    torch.library.register_autograd(forward, differentiate, setup_context=_setup_context)
    torch.library.register_autograd(backward, _no_double_backward)


_load.register(_register)
