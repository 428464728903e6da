"""Which parameters of a model are decayed, and how often they move."""

import torch
from torch import nn

from hope.config import TrainConfig
from hope.layers import ContinuumMemory
from hope.optim import MultiFrequency
from hope.optim.base import by_mesh


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay on the matrices of linear layers and embeddings only.

    With `config.level_periods` the MLPs of continuum memory systems are groups of their own, which
    move by what they have accumulated once in their period; all else moves in every step.
    """
    matrices = {
        module.weight for module in model.modules() if isinstance(module, (nn.Linear, nn.Embedding))
    }
    period_of = {
        parameter: period
        for memory in model.modules()
        if isinstance(memory, ContinuumMemory) and config.level_periods
        for level, period in zip(memory.levels, config.level_periods, strict=True)
        for parameter in level.parameters()
    }
    groups = []
    for period in sorted({1, *period_of.values()}):
        members = [p for p in model.parameters() if period_of.get(p, 1) == period]
        groups += [
            {"params": [p for p in members if p in matrices], "weight_decay": config.weight_decay},
            {"params": [p for p in members if p not in matrices], "weight_decay": 0.0},
        ]
        if config.level_periods:
            groups[-2]["period"] = groups[-1]["period"] = period
    # A fused step takes parameters that are cut over the same ranks.
    groups = [
        {**group, "params": alike} for group in groups for alike in by_mesh(group["params"]) or [[]]
    ]
    options = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.level_periods:
        return MultiFrequency(groups, **options)
    return torch.optim.AdamW(groups, fused=True, **options)
