"""Tries mutants of a library with switches, each in a process of its own.

    python trials.py LIBRARY BOUNDS

runs in a process that the library's variant can run in (``build.run`` with ``preload``). It has
loaded torch, which takes seconds, and forks for every line of its input: a `Trial` in JSON, of
which it prints how that ended, a `Said` in JSON. It ends with its input.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from emulator import instances
from emulator.processes import forked
from hope_ext import testing


class Trial(NamedTuple):
    number: int  # of the mutant, 0 for none
    names: list[str]  # instances
    seed: int
    seconds: float

    def off(self) -> Trial:
        """The same of the kernels as they are."""
        return self._replace(number=0)


def warm_up() -> None:
    """What torch loads when it is first used, so that a fork has it; makes no thread."""
    torch.set_num_threads(1)
    x = torch.ones(1, requires_grad=True)
    torch.autograd.grad(x * 1, x, torch.ones(1))


def main() -> int:
    library, bounds = Path(sys.argv[1]), torch.load(sys.argv[2], weights_only=False)
    warm_up()
    testing.use_emulated(library)
    switch = ctypes.CDLL(str(library)).mutants_switch
    every = {str(instance): instance for instance in instances.instances()}
    for line in sys.stdin:
        trial = Trial(*json.loads(line))

        def work(trial: Trial = trial) -> None:
            switch(trial.number)
            for name in trial.names:
                instances.check_one(every[name], [trial.seed], bounds)

        print(json.dumps(forked(work, trial.seconds)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
