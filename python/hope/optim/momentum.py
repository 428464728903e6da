"""Momentum as a memory of gradients: with a preconditioner, and with a delta rule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hope.optim.base import Group, Optimizer, as_matrix, check_number, wide, zeros

Preconditioner = str | Callable[[Tensor], Tensor] | None


def check_preconditioner(group: Group) -> None:
    given = group["preconditioner"]
    if given not in (None, "diagonal") and not callable(given):
        raise ValueError(f"preconditioner: expected None, 'diagonal' or a function, got {given!r}")
    check_number(group, "beta2", 0, 1)
    check_number(group, "eps")


def preconditioned(optimizer: Optimizer, group: Group, params: list[Tensor]) -> list[Tensor]:
    """P(g) of the parameters' gradients, in their shapes and the states' dtype.

    With the preconditioner None these may be the gradients themselves: not to be written to.
    """
    grads = [parameter.grad.to(wide(parameter.dtype)) for parameter in params]
    given = group["preconditioner"]
    if given is None:
        return grads
    if callable(given):
        return [_call(given, g) for g in grads]
    states = [optimizer.state[parameter] for parameter in params]
    for parameter, state in zip(params, states, strict=True):
        if "square" not in state:
            state["square"], state["squares"] = zeros(parameter), 0
        state["squares"] += 1  # gradients in the average
    averages, beta2 = [state["square"] for state in states], group["beta2"]
    torch._foreach_mul_(averages, beta2)
    torch._foreach_addcmul_(averages, grads, grads, value=1 - beta2)
    corrections = [1 / (1 - beta2 ** state["squares"]) for state in states]
    roots = torch._foreach_sqrt(torch._foreach_mul(averages, corrections))
    torch._foreach_add_(roots, group["eps"])
    return list(torch._foreach_div(grads, roots))


def _call(function: Callable[[Tensor], Tensor], g: Tensor) -> Tensor:
    matrix = as_matrix(g)
    result = function(matrix)
    if not isinstance(result, Tensor) or result.shape != matrix.shape:
        got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(
            f"preconditioner: expected it to give a tensor of shape {list(matrix.shape)}, got {got}"
        )
    return result.to(g.dtype).reshape(g.shape)


class PreconditionedMomentum(Optimizer):
    """Momentum as a linear memory that is written with preconditioned gradients.

    Nested Learning (arXiv 2512.24695), equations 19-20:

        m <- alpha m - lr P(g),   W <- W + m

    With the preconditioner None, P(g) = g: the heavy ball, which is torch.optim.SGD with momentum
    alpha while lr is constant (here a change of lr concerns later gradients only). "diagonal" is
    P(g) = g / (sqrt(v) + eps), v the bias-corrected exponential average of g^2; with alpha = 0 that
    is torch.optim.Adam with betas (0, beta2).

    Args:
        params: parameters or groups of them.
        lr: 0 or more.
        alpha: in [0, 1].
        preconditioner: None, "diagonal", or a function of a gradient as a matrix [m, n] (first
            dimension by the rest; vectors are [1, n]) that gives a matrix of that shape.
        beta2, eps: of "diagonal".
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        alpha: float = 0.9,
        preconditioner: Preconditioner = None,
        beta2: float = 0.999,
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "alpha": alpha, "preconditioner": preconditioner}
        super().__init__(params, {**defaults, "beta2": beta2, "eps": eps})

    def _check(self, group: Group) -> None:
        check_number(group, "lr")
        check_number(group, "alpha", 0, 1, closed=True)
        check_preconditioner(group)

    def _update(self, group: Group, params: list[Tensor]) -> None:
        momenta = momenta_of(self, params)
        directions = preconditioned(self, group, params)
        torch._foreach_mul_(momenta, group["alpha"])
        torch._foreach_add_(momenta, directions, alpha=-float(group["lr"]))
        torch._foreach_add_(params, momenta)


class DeltaMomentum(Optimizer):
    """Momentum that forgets along the gradient: a memory written with the delta rule.

    Nested Learning (arXiv 2512.24695), equations 21-22, with g and m as matrices [m, n] (first
    dimension by the rest; vectors are [1, n]):

        u = g / max(|g|_F, norm_eps)
        m <- m (alpha I - beta u^T u) - lr P(g),   W <- W + m

    The paper has g^T g in place of u^T u, which expands m once |g|^2 exceeds 1 + alpha; with u of
    length 1 it cannot. beta = 0 is `PreconditionedMomentum`.

    Args:
        params, lr, alpha, preconditioner, beta2, eps: those of `PreconditionedMomentum`.
        beta: in [0, 1].
        norm_eps: the least norm that a gradient is divided by.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        alpha: float = 0.9,
        beta: float = 0.5,
        preconditioner: Preconditioner = None,
        beta2: float = 0.999,
        eps: float = 1e-8,
        norm_eps: float = 1e-12,
    ) -> None:
        defaults = {"lr": lr, "alpha": alpha, "beta": beta, "preconditioner": preconditioner}
        super().__init__(params, {**defaults, "beta2": beta2, "eps": eps, "norm_eps": norm_eps})

    def _check(self, group: Group) -> None:
        check_number(group, "lr")
        check_number(group, "alpha", 0, 1, closed=True)
        check_number(group, "beta", 0, 1, closed=True)
        check_number(group, "norm_eps")
        check_preconditioner(group)

    def _update(self, group: Group, params: list[Tensor]) -> None:
        momenta = momenta_of(self, params)
        forgotten = [
            _along_gradient(momentum, parameter.grad, group["norm_eps"])
            for momentum, parameter in zip(momenta, params, strict=True)
        ]
        directions = preconditioned(self, group, params)
        torch._foreach_mul_(momenta, group["alpha"])
        torch._foreach_add_(momenta, forgotten, alpha=-group["beta"])
        torch._foreach_add_(momenta, directions, alpha=-float(group["lr"]))
        torch._foreach_add_(params, momenta)


def momenta_of(optimizer: Optimizer, params: list[Tensor]) -> list[Tensor]:
    for parameter in params:
        if "momentum" not in optimizer.state[parameter]:
            optimizer.state[parameter]["momentum"] = zeros(parameter)
    return [optimizer.state[parameter]["momentum"] for parameter in params]


def _along_gradient(momentum: Tensor, grad: Tensor, eps: float) -> Tensor:
    """m u^T u, by way of the smaller product."""
    m, g = as_matrix(momentum), as_matrix(grad.to(momentum.dtype))
    u = g / torch.linalg.matrix_norm(g).clamp(min=eps)
    return torch.linalg.multi_dot((m, u.mT, u)).reshape(momentum.shape)
