"""Runs packed cases with bounds that nobody has looked at, and carried states with positions that
nobody has, in a library with AddressSanitizer.

    python nonsense.py LIBRARY [OPERATOR ...]

On a GPU these values are not checked: a kernel may do with them what it likes, except touch other
memory. Prints "all done" in the end. OPERATOR: only the cases of these.
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
        if not case.runs_on("emulated"):
            continue
        arguments = case.make(torch.float32, "cpu")
        bounds = arguments.get("cu_seqlens")
        position = getattr(arguments.get("state"), "position", None)
        if bounds is None and position is None:
            continue
        for seed in range(SEEDS if bounds is not None else 1):
            draw = torch.Generator().manual_seed(seed)
            for numbers, limits in ((bounds, (-9, 220)), (position, (-1000, 1000))):
                if numbers is not None:
                    numbers.random_(*limits, generator=draw)
            print(f"{case}, seed {seed}", flush=True)
            evaluate(case, arguments, "emulated")
    print("all done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
