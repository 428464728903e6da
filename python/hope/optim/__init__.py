"""The optimizers of Nested Learning (arXiv 2512.24695), written out.

An optimizer is a memory of gradients; these differ in what the memory is and how it is written.
Each is a torch.optim.Optimizer with its equation in its docstring. docs/optim.md compares them.
Muon is torch's own.
"""

from torch.optim import Muon

from hope.optim.dgd import DGD
from hope.optim.dmgd import DMGD
from hope.optim.m3 import M3
from hope.optim.momentum import DeltaMomentum, PreconditionedMomentum
from hope.optim.multi_frequency import MultiFrequency

__all__ = ["DGD", "DMGD", "M3", "DeltaMomentum", "MultiFrequency", "Muon", "PreconditionedMomentum"]
