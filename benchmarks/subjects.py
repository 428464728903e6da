"""What a benchmark measures: operators, the rows of their contests, and the work of a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FORWARD, TRAINING = "forward", "forward+backward"
PASSES = (FORWARD, TRAINING)


@dataclass(frozen=True)
class Setting:
    """What all rows of a contest have in common. shape: sizes by their letters."""

    shape: dict[str, int]
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        sizes = " ".join(f"{letter}={size}" for letter, size in self.shape.items())
        return f"{sizes} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Work:
    """What a call cannot do without: floating-point operations, and bytes that memory must move.

    bytes: None where it was not counted.
    """

    flops: int
    bytes: int | None = None


@dataclass(frozen=True)
class Subject:
    """A row's call, ready to run.

    Attributes:
        forward: gives one tensor.
        leaves: what the backward finds gradients of.
        tokens: that one call processes.
        work: of each pass.
    """

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    tokens: int
    work: dict[str, Work]

    def call(self, direction: str) -> Callable[[], object]:
        """The function that is timed for a pass: without gradients, or with all of them."""
        return torch.no_grad()(self.forward) if direction == FORWARD else self._train

    def _train(self) -> tuple[Tensor | None, ...]:
        out = self.forward()
        return torch.autograd.grad(out, self.leaves, torch.ones_like(out), allow_unused=True)


@dataclass(frozen=True)
class Row:
    """An implementation in a contest.

    prepare: a function of a module, so that a fresh process can be told to run it.
    peer: the distribution that it comes from, where it is not ours (see peers.py).
    """

    name: str
    prepare: Callable[[Setting], Subject]
    peer: str | None = None


@dataclass(frozen=True)
class Contest:
    """Rows that do the same job and are timed in turns; speeds are ratios to the row `baseline`."""

    name: str
    rows: tuple[Row, ...]
    baseline: str


@dataclass(frozen=True)
class Operator:
    """An operator's benchmark.

    Attributes:
        stem: the operator's word, as in csrc/<stem>.
        letters: of a shape, as `--shape` takes it.
        shapes: the default ones of "cpu" and "cuda".
        contests: what is timed.
        run: the operator's public function, looked up when it is called.
        check_arguments: its arguments for the correctness check at a setting, gradients included.
        quick: a shape cut down to what only shows that everything runs; also memory's warm-up.
    """

    stem: str
    letters: str
    shapes: dict[str, tuple[tuple[int, ...], ...]]
    contests: tuple[Contest, ...]
    run: Callable[..., Any]
    check_arguments: Callable[[Setting], dict[str, Any]]
    quick: Callable[[dict[str, int]], dict[str, int]]
