"""A case of an operator: its inputs, and what runs on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """Inputs of one operator: `make(dtype, device)` gives the keyword arguments of `function`."""

    stem: str
    name: str
    function: Callable[..., Any]
    make: Callable[[torch.dtype, str], dict[str, Any]]
    tiny: bool = False  # small enough for gradcheck
    everything: str | None = "return_state"  # the argument that makes it return its final state too
    cuda: bool = True  # there are CUDA kernels for these sizes
    differentiable: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)  # and float64

    def __str__(self) -> str:
        return f"{self.stem}-{self.name}"

    def returning_everything(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments with which it also returns its final state, if it has one."""
        return {**arguments, self.everything: True} if self.everything else arguments

    def runs_on(self, backend: str) -> bool:
        """Whether a backend has these sizes: only CUDA's kernels are choosy."""
        return self.cuda or backend not in ("cuda", "emulated")
