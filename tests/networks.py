"""A small network, inputs and a loss for the tests of optimizers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def network(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """Matrices, vectors, and a parameter of three dimensions (a convolution's)."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 2), nn.Flatten()
    ).to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Iterable[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(7, 6, generator=draw, dtype=torch.float64).to(dtype) for _ in range(count)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Iterable[Tensor]) -> None:
    for x in inputs:
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]
