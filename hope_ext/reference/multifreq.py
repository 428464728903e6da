"""Equation 71 of Nested Learning (arXiv 2512.24695) for an optimizer's step: every parameter takes
the rule's steps of a whole period at once."""

from collections.abc import Sequence

import torch
from torch import Tensor


def multifreq_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    pending: Sequence[Tensor],  # like params, or with 0 elements where the period is 1
    exp_avgs: Sequence[Tensor],  # m; none for "sgd"
    exp_avg_sqs: Sequence[Tensor],  # v; none for "sgd"
    periods: Sequence[int],
    step: int,  # i, from 1
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rule: str,
) -> None:
    """In step i, for every parameter p with gradient g, in float32 (float64 if p is):

    adamw:  m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
            direction = (m / (1 - beta1^i)) / (sqrt(v / (1 - beta2^i)) + eps) + weight_decay p
    sgd:    direction = g + weight_decay p
    pending <- pending + lr direction
    where the period divides i:   p <- p - pending,   pending <- 0
    """
    for index, (p, grad, period) in enumerate(zip(params, grads, periods, strict=True)):
        wide = torch.promote_types(p.dtype, torch.float32)
        direction = g = grad.to(wide)
        if rule == "adamw":
            m, v = exp_avgs[index], exp_avg_sqs[index]
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            direction = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + eps)
        if weight_decay != 0:
            direction = direction + weight_decay * p.to(wide)
        kept = pending[index] if pending[index].numel() else torch.zeros_like(direction)
        kept.add_(direction, alpha=lr)
        if step % period == 0:
            p.copy_(p.to(wide) - kept)
            kept.zero_()
