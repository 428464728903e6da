"""Vectors scaled to a length, with gradients in few passes over memory."""

from typing import Any

import torch
from torch import Tensor, nn


class _Unit(torch.autograd.Function):
    """y = length * x / sqrt(|x|^2 + eps) along the last dimension, in few passes over memory.

    With r = (|x|^2 + eps)^(-1/2) and u = r x: d_x = length * r (d_y - u <u, d_y>).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, length: float, eps: float) -> Tensor:
        y, scale = _scale_to(x, length, eps)
        ctx.save_for_backward(y, scale)
        ctx.length = length
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        d_x = torch.empty_like(grad)
        _scale_to_backward(grad, *ctx.saved_tensors, ctx.length, out=d_x)
        return d_x, None, None


class _UnitQK(torch.autograd.Function):
    """q, k, v of qkv [B, T, 3, H, D], q and k of length 1.

    The backward writes its parts where they belong; autograd would join them by copies.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        (q, q_scale), (k, k_scale) = (_scale_to(x, 1.0, eps) for x in qkv[:, :, :2].unbind(2))
        ctx.save_for_backward(q, q_scale, k, k_scale)
        return q, k, qkv[:, :, 2].clone()

    @staticmethod
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> tuple[Tensor, None]:
        q, q_scale, k, k_scale = ctx.saved_tensors
        batch, tokens, heads, size = q.shape
        d_qkv = q.new_empty(batch, tokens, 3, heads, size)
        _scale_to_backward(d_q, q, q_scale, 1.0, d_qkv[:, :, 0])
        _scale_to_backward(d_k, k, k_scale, 1.0, d_qkv[:, :, 1])
        d_qkv[:, :, 2] = d_v
        return d_qkv, None


def _scale_to(x: Tensor, length: float, eps: float) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale = (torch.rsqrt(norm.square() + eps) * length).to(x.dtype)
    return x * scale, scale


def _scale_to_backward(grad: Tensor, y: Tensor, scale: Tensor, length: float, out: Tensor) -> None:
    along = (y * grad).sum(-1, keepdim=True)
    out.copy_(grad).addcmul_(y, along, value=-(length**-2)).mul_(scale)


def unit(x: Tensor, length: float = 1.0, eps: float = 1e-6) -> Tensor:
    """x [..., D] scaled to `length` along the last dimension (zeros stay zeros)."""
    return _Unit.apply(x, length, eps)


def unit_qk(qkv: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, T, H, D] of qkv [B, T, 3, H, D], q and k scaled to length 1."""
    return _UnitQK.apply(qkv, eps)


class RMSNorm(nn.Module):
    """x [..., C] scaled to length sqrt(C), times a learned weight per channel, in x's dtype.

    (torch's own has a slow path, and a warning, where autocast made x of another dtype.)
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return unit(x, len(self.weight) ** 0.5) * self.weight.to(x.dtype)
