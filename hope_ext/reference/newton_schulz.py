"""The Newton-Schulz iteration: a matrix with the same singular vectors, and singular values that
are all near 1.

Legend: M rows, N columns.
"""

import torch
from torch import Tensor


def newton_schulz(
    g: Tensor,  # [..., M, N]
    steps: int,
    a: float,
    b: float,
    c: float,
    eps: float,
    product_dtype: torch.dtype | None = None,
) -> Tensor:
    """X_0 = g / (|g|_F + eps); `steps` times X <- a X + (b A + c A^2) X with A = X X^T.

    Computed in float32 (float64 if g is) and rounded to g's dtype once.

    A tall matrix goes through as its transpose, so that A is the smaller of the two products.

    product_dtype: the operands of every product are rounded to it first, which is what a kernel
    that multiplies 16-bit numbers does.
    """
    wide = torch.promote_types(g.dtype, torch.float32)

    def product(left: Tensor, right: Tensor) -> Tensor:
        if product_dtype is not None:
            left, right = (x.to(product_dtype).to(wide) for x in (left, right))
        return left @ right

    x = g.to(wide)
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + eps)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = product(x, x.mT)
        x = a * x + product(b * gram + c * product(gram, gram), x)
    return (x.mT if tall else x).to(g.dtype).contiguous()
