"""The Newton-Schulz iteration: public function and fake kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hope_ext import _check, _load
from hope_ext.reference import newton_schulz as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def newton_schulz(
    g: Tensor,
    *,
    steps: int = 5,
    coefficients: Sequence[float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
) -> Tensor:
    """Nearly the orthogonal factor U V^T of every matrix g = U S V^T, without a decomposition.

        X_0 = g / (|g|_F + eps)
        X <- a X + (b A + c A^2) X,   A = X X^T            `steps` times

    An odd polynomial of X is the same polynomial of its singular values and leaves its singular
    vectors alone. With the default coefficients (K. Jordan's, of Muon), five steps bring singular
    values of X_0 between 0.01 and 1 to between 0.65 and 1.25; smaller ones grow by at most 3.4445
    a step. A is computed on the smaller side. Products are sums in float32 and use the symmetry of
    A and A^2.

    It has no derivative: a gradient that arrives here raises an error.

    Args:
        g: [..., M, N], one or many matrices; float32 or bfloat16 (float64 on the CPU).
        steps: of the iteration, 0 or more.
        coefficients: (a, b, c).
        eps: is added to the norm, 0 or more; a matrix of zeros stays one if it is positive.

    Returns:
        [..., M, N] in g's dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check.tensor("g", g, DTYPES)
    if g.dim() < 2:
        raise ValueError(f"g: expected [..., M, N], got shape {list(g.shape)}")
    a, b, c = _checked_coefficients(coefficients)
    if not isinstance(steps, int | torch.SymInt) or isinstance(steps, bool):
        raise TypeError(f"steps: expected an integer, 0 or more, got {steps!r}")
    if not 0 <= steps < 2**31:
        raise ValueError(f"steps: expected an integer, 0 or more and below 2**31, got {steps}")
    _check.number("eps", eps)
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: expected a finite number, 0 or more, got {eps}")
    arguments = (g, steps, a, b, c, float(eps))
    if _load.use_reference():
        return reference.newton_schulz(*arguments)
    return _load.operators().newton_schulz(*arguments)


def _checked_coefficients(coefficients: object) -> tuple[float, float, float]:
    if not isinstance(coefficients, Sequence) or isinstance(coefficients, str):
        raise TypeError(f"coefficients: expected three numbers (a, b, c), got {coefficients!r}")
    if len(coefficients) != 3:
        raise ValueError(
            f"coefficients: expected three numbers (a, b, c), got {len(coefficients)} of them"
        )
    for i, coefficient in enumerate(coefficients):
        _check.number(f"coefficients[{i}]", coefficient)
        if not -math.inf < coefficient < math.inf:
            raise ValueError(f"coefficients[{i}]: expected a finite number, got {coefficient}")
    a, b, c = map(float, coefficients)
    return a, b, c


# ---- fake kernel and autograd --------------------------------------------------------------------


def _fake(g, steps, a, b, c, eps):
    return g.new_empty(g.shape)


def _no_backward(ctx, *_):
    raise RuntimeError(
        "newton_schulz: has no derivative; call it under torch.no_grad() or with g.detach()"
    )


def _register(library: str) -> None:
    torch.library.register_fake(f"{library}::newton_schulz", _fake)
    torch.library.register_autograd(f"{library}::newton_schulz", _no_backward)


_load.register(_register)
