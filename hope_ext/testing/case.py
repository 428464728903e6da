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
    everything: str = "return_state"  # the argument that makes it return its final state too
    cuda: bool = True  # there are CUDA kernels for these sizes

    def __str__(self) -> str:
        return f"{self.stem}-{self.name}"

    def runs_on(self, backend: str) -> bool:
        """Whether a backend has these sizes: only CUDA's kernels are choosy."""
        return self.cuda or backend not in ("cuda", "emulated")
