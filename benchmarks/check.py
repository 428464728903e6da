"""The gate in front of every speed: is the operator right, here and at this shape?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from hope_ext import testing


@dataclass(frozen=True)
class Error:
    """The norm of a result's error against float64, and what the laws of the tests allow it."""

    name: str
    error: float
    allowed: float

    @property
    def red(self) -> bool:
        return not self.error <= self.allowed  # NaN is red


def errors(
    run: Callable[..., Any], arguments: dict[str, Any], *, gradients: bool = True
) -> list[Error]:
    """Errors of every output, final state and, if it has them, gradient of `run(**arguments)`.

    Allowed is, as in tests/test_ops.py, twice what the definition itself errs by in this dtype (in
    16 bits: its chunked form with rounded operands of products), and a small floor.
    """
    rows = _pytree.tree_leaves(arguments)[0]  # the first argument decides dtype and device
    dtype = rows.dtype
    on_cpu = _map_tensors(Tensor.cpu, arguments)
    exact = _map_tensors(lambda x: x.double() if x.is_floating_point() else x, on_cpu)
    backend = "reference" if dtype == torch.float32 else "rounded"
    found = []
    truth = _results(run, exact, "reference", gradients)
    yardstick = _results(run, on_cpu, backend, gradients, dtype)
    ours = _results(run, arguments, rows.device.type, gradients)
    for name, right in truth.items():
        x = ours[name].cpu().double()
        floor = 2 * torch.finfo(ours[name].dtype).eps * right.norm() + 1e-7 * right.numel() ** 0.5
        allowed = 2 * (yardstick[name].double() - right).norm() + floor
        found.append(Error(name, (x - right).norm().item(), allowed.item()))
    return found


def _results(
    run: Callable[..., Any],
    arguments: dict[str, Any],
    backend: str,
    with_gradients: bool,
    product_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Every floating-point output, and the gradient of every floating-point input, by name."""

    if not with_gradients:
        with testing.backend(backend, product_dtype), torch.no_grad():
            flat = _pytree.tree_leaves(run(**arguments))
        return {f"output {i}": x for i, x in enumerate(flat) if isinstance(x, Tensor)}

    def fresh_leaf(x: Tensor) -> Tensor:
        x = x.detach()
        return x.requires_grad_() if x.is_floating_point() else x

    arguments = _map_tensors(fresh_leaf, arguments)
    leaves = {
        f"gradient of {name}": x
        for name, value in arguments.items()
        for x in _pytree.tree_leaves(value)
        if isinstance(x, Tensor) and x.requires_grad
    }
    with testing.backend(backend, product_dtype):
        flat = _pytree.tree_leaves(run(**arguments))
        outputs = [x for x in flat if isinstance(x, Tensor) and x.requires_grad]
        random = torch.Generator().manual_seed(1)
        cotangents = [
            torch.randn(x.shape, generator=random).bfloat16().to(x.device, x.dtype) for x in outputs
        ]
        gradients = torch.autograd.grad(
            outputs, list(leaves.values()), cotangents, materialize_grads=True
        )
    results = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    return {**results, **dict(zip(leaves, gradients, strict=True))}


def _map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    return _pytree.tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, tree)
