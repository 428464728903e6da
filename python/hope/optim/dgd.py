"""Gradient descent that also forgets along the inputs of linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import ParamsT

from hope.optim.base import Group, Optimizer, check_number, wide


class DGD(Optimizer):
    """Delta gradient descent.

    Nested Learning (arXiv 2512.24695), equations 56-57: a step is the solution of a regression with
    the weights as a memory of the layer's inputs, so that it depends on the weights too. For the
    weight W [out, in] of an nn.Linear with gradient g, x being its inputs of this step, each of
    length 1:

        rate = lr / (1 + lr)
        W <- W (I - rate mean(x x^T)) - rate g

    All other parameters take a step of gradient descent, W <- W - lr g.

    Inputs are collected by a hook on every linear layer of `model` whose weight is among `params`:
    those of all forwards with gradients enabled since the last step. `close` removes the hooks.

    Args:
        params: parameters or groups of them.
        model: the module whose linear layers they belong to.
        lr: 0 or more.
    """

    def __init__(self, params: ParamsT, model: nn.Module, lr: float | Tensor = 1e-2) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        super().__init__(params, {"lr": lr})
        mine = {parameter for group in self.param_groups for parameter in group["params"]}
        self._names: dict[Tensor, str] = {}  # of the linear layers' weights
        self._seen: dict[Tensor, tuple[Tensor, int]] = {}  # sum of x x^T [in, in], number of x
        self._hooks = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module.weight in mine:
                self._names[module.weight] = name
                self._hooks.append(module.register_forward_hook(self._collect))

    def _check(self, group: Group) -> None:
        check_number(group, "lr")

    def close(self) -> None:
        """Removes the hooks; a step of a linear layer is an error from then on."""
        while self._hooks:
            self._hooks.pop().remove()

    def _collect(self, module: nn.Linear, inputs: tuple[Any, ...], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        with torch.no_grad(), torch.autocast(module.weight.device.type, enabled=False):
            x = inputs[0].reshape(-1, module.in_features).to(wide(module.weight.dtype))
            x = F.normalize(x, dim=-1)
            products, count = self._seen.get(module.weight, (0, 0))
            self._seen[module.weight] = (products + x.mT @ x, count + len(x))

    def _update(self, group: Group, params: list[Tensor]) -> None:
        lr = float(group["lr"])
        rate = lr / (1 + lr)
        for parameter in params:
            if parameter not in self._names:
                parameter.sub_(parameter.grad, alpha=lr)
                continue
            if parameter not in self._seen:
                raise RuntimeError(
                    f"DGD: no inputs of the linear layer {self._names[parameter]!r} were seen "
                    "since the last step; was it called as a module, and before close()?"
                )
            products, count = self._seen.pop(parameter)
            w = parameter.to(products.dtype)
            step = torch.addmm(parameter.grad.to(w.dtype), w, products, alpha=1 / max(count, 1))
            parameter.copy_(w - rate * step)
