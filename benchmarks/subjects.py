"""What a benchmark measures: operators, the rows of their contests, and the work of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

FORWARD, BACKWARD, TRAINING = "forward", "backward", "forward+backward"
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

    flops: 0 where they were not counted.
    bytes: None where they were not.
    """

    flops: int
    bytes: int | None = None


def moved(inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> dict[str, int]:
    """Bytes of each pass, every tensor once: the backward reads the inputs and the gradients of the
    outputs, and writes the gradients of the inputs."""
    read = sum(x.numel() * x.element_size() for x in inputs)
    written = sum(x.numel() * x.element_size() for x in outputs)
    return {FORWARD: read + written, TRAINING: 3 * read + 2 * written}


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
        if direction == FORWARD:
            return torch.no_grad()(self.forward)
        incoming: list[Tensor] = []  # the output's gradient: made once, since it is an input

        def train() -> tuple[Tensor | None, ...]:
            out = self.forward()
            if not incoming:
                incoming.append(torch.randn_like(out))
            return torch.autograd.grad(out, self.leaves, incoming, allow_unused=True)

        return train


@dataclass(frozen=True)
class Row:
    """An implementation in a contest.

    prepare: a function of a module, so that a fresh process can be told to run it.
    peer: the distribution that it comes from, where it is not ours (see peers.py).
    at: its own shape, of the contest's, where it cannot do that one; its speed is then not compared
        with the others'.
    compiles: at its first call, for longer than it runs (see peers.compile_first).
    """

    name: str
    prepare: Callable[[Setting], Subject]
    peer: str | None = None
    at: Callable[[dict[str, int]], dict[str, int]] | None = None
    compiles: bool = False

    def setting(self, contest: Setting) -> Setting:
        """What it is measured at."""
        return contest if self.at is None else replace(contest, shape=self.at(contest.shape))


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
        variant: what of it, if that is not all.
        letters: of a shape, as `--shape` takes it.
        shapes: the default ones of "cpu" and "cuda".
        contests: what is timed on "cpu" and "cuda".
        run: the operator's public function, looked up when it is called.
        check_arguments: its arguments for the correctness check at a setting, gradients included.
        quick: a shape cut down to what only shows that everything runs; also memory's warm-up.
        roofs: the kinds of roof, "flops" or "bytes", that hold for it on "cpu" and "cuda".
        passes: those that are timed; an operator without a derivative has no training.
        bounds: the work of a forward and of a backward in the design that the CUDA kernels follow,
            recomputation included; None where that is the work of the passes.
    """

    stem: str
    letters: str
    shapes: dict[str, tuple[tuple[int, ...], ...]]
    contests: dict[str, tuple[Contest, ...]]
    run: Callable[..., Any]
    check_arguments: Callable[[Setting], dict[str, Any]]
    quick: Callable[[dict[str, int]], dict[str, int]]
    roofs: dict[str, tuple[str, ...]] = field(
        default_factory=lambda: {"cpu": ("flops",), "cuda": ("flops", "bytes")}
    )
    passes: tuple[str, ...] = PASSES
    bounds: Callable[[Setting], dict[str, Work]] | None = None
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.stem}-{self.variant}" if self.variant else self.stem

    def peers(self, device: str) -> set[str]:
        """The distributions that its rows on a device come from."""
        rows = (row for contest in self.contests[device] for row in contest.rows)
        return {row.peer for row in rows if row.peer is not None}
