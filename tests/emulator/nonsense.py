"""Runs packed cases with bounds that nobody has looked at, in a library with AddressSanitizer.

    python nonsense.py LIBRARY [OPERATOR ...]

On a GPU the values of cu_seqlens are not checked: a kernel may do with them what it likes, except
touch other memory. Prints "all done" in the end. OPERATOR: only the cases of these.
"""

from __future__ import annotations

import sys

import torch
from laws import evaluate

from hope_ext import _check, testing

SEEDS = 4


def main() -> int:
    testing.use_emulated(sys.argv[1])
    _check.cu_seqlens = lambda bounds, rows, like="q": len(bounds) - 1
    operators = tuple(sys.argv[2:]) or ""
    for case in testing.CASES:
        if not str(case).startswith(operators):
            continue
        arguments = case.make(torch.float32, "cpu")
        if "cu_seqlens" not in arguments or not case.runs_on("emulated"):
            continue
        count = len(arguments["cu_seqlens"])
        for seed in range(SEEDS):
            draw = torch.Generator().manual_seed(seed)
            bounds = torch.randint(-9, 220, (count,), generator=draw, dtype=torch.int32)
            print(f"{case}, seed {seed}", flush=True)
            evaluate(case, {**arguments, "cu_seqlens": bounds}, "emulated")
    print("all done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
