"""Matrices kept below a spectral norm."""

import torch
import torch.nn.functional as F
from torch import Tensor

_ITERATIONS = 8


def limited(w: Tensor, limit: float) -> Tensor:
    """w [..., m, n] scaled down to a spectral norm of `limit` where its own is larger.

    The norm is found by power iteration from a fixed vector (which errs to the low side, by little
    where few singular values are near the largest); its gradient is exact for the vectors found.
    """
    with torch.no_grad():
        # Not all ones: a matrix may well map these to zero.
        v = torch.linspace(1, 2, w.shape[-1], dtype=w.dtype, device=w.device).sin()[:, None]
        for _ in range(_ITERATIONS):
            u = F.normalize(w @ v, dim=-2)
            v = F.normalize(w.mT @ u, dim=-2)
    norm = (u * (w @ v)).sum((-2, -1), keepdim=True)
    return w * (limit / norm).clamp(max=1)
