"""Training on many processes, started by torchrun: data, tensor and sequence parallelism.

A grid of processes (`mesh`), layers shared by ranks (`tensor`), sequences handed on from rank to
rank (`sequence`), and the three together around a model (`wrap`). Under each, memories are
rewritten by just what one process would let them read.
"""

from hope.parallel.grid import Grid
from hope.parallel.mesh import make_mesh, part, process_group
from hope.parallel.wrap import Objective, clip_gradients, parallelize, whole

__all__ = [
    "Grid",
    "Objective",
    "clip_gradients",
    "make_mesh",
    "parallelize",
    "part",
    "process_group",
    "whole",
]
