"""The steps of `make gpu` that need the extension, each in a process of its own.

python -m benchmarks.on_gpu environment   what the other steps depend on, as JSON
python -m benchmarks.on_gpu selftests     the CUDA primitives' own
python -m benchmarks.on_gpu smallest      every operator's smallest cases, for a sanitizer
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import _pytree

from benchmarks import report
from hope_ext import _load, testing
from hope_ext.testing import CASES, Case

SMALLEST_CASES = 6  # of each operator
DTYPES = (torch.float32, torch.bfloat16)


def environment() -> int:
    """Prints one line of JSON: the machine, the versions, and which operators have CUDA kernels."""
    print(json.dumps({**report.environment("cuda"), "cuda_stems": report.cuda_stems()}))
    return 0


def selftests() -> int:
    """Prints every self-test's result; returns 1 if one is wrong."""
    results = _load.extension.run_selftests()
    for name, wrong in results:
        print(f"{name}: {wrong or 'ok'}")
    return int(not results or any(wrong for _, wrong in results))


def smallest() -> int:
    """Runs the smallest cases forward and backward; values are for the laws to judge."""
    for stem in report.cuda_stems():
        for case in smallest_cases(stem):
            for dtype in DTYPES:
                run_case(case, dtype, "cuda")
            print(f"{case} ran", flush=True)
    return 0


def smallest_cases(stem: str) -> list[Case]:
    """Those with the fewest numbers in them that run on CUDA, and have any."""
    sizes = {case: _size(case) for case in CASES if case.stem == stem and case.runs_on("cuda")}
    return sorted((case for case in sizes if sizes[case]), key=sizes.__getitem__)[:SMALLEST_CASES]


def _size(case: Case) -> int:
    """How many numbers a case's first argument has: a tensor, or a list of them."""
    first = next(iter(case.make(torch.float32, "cpu").values()))
    return sum(x.numel() for x in _pytree.tree_leaves(first))


def run_case(case: Case, dtype: torch.dtype, device: str) -> None:
    """All outputs, and the gradients of all inputs, if the operator has a derivative."""
    trains = case.differentiable
    arguments = _pytree.tree_map(
        lambda x: x.requires_grad_(trains) if _is_float(x) else x, case.make(dtype, device)
    )
    with testing.backend(device):
        outputs = case.function(**case.returning_everything(arguments))
    found = [x for x in _pytree.tree_leaves(outputs) if _is_float(x) and x.requires_grad]
    leaves = [x for x in _pytree.tree_leaves(arguments) if _is_float(x)]
    if trains:
        torch.autograd.grad(found, leaves, [torch.ones_like(x) for x in found], allow_unused=True)
    if device == "cuda":
        torch.cuda.synchronize()


def _is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def main(arguments: Sequence[str] | None = None) -> int:
    steps = {step.__name__: step for step in (environment, selftests, smallest)}
    parser = argparse.ArgumentParser("python -m benchmarks.on_gpu")
    parser.add_argument("step", choices=list(steps))
    return steps[parser.parse_args(arguments).step]()


if __name__ == "__main__":
    sys.exit(main())
