"""The grid of processes, and which part of a batch each of them reads."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hope.config import ParallelConfig
from hope.config.check import require

# From the outermost to the innermost: neighbours, which are the fastest to reach, share layers, and
# what only hands a state on may be far away.
AXES = ("sequence", "data", "tensor")


def launched() -> bool:
    """Whether torchrun, or something that sets its variables, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """The processes that torchrun started, joined; gives the device of this one.

    device: "cpu" (gloo) or "cuda" (NCCL, the GPU of the process's place on its machine).
    """
    here = torch.device(device)
    if here.type == "cuda":
        here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if here.type == "cuda" else "gloo")
    try:
        yield here
    finally:
        dist.destroy_process_group()


def make_mesh(config: ParallelConfig, device: torch.device) -> DeviceMesh:
    """The grid of all joined processes, with the dimensions AXES. Raises HopeError."""
    data = config.data_ranks(dist.get_world_size())
    return init_device_mesh(
        device.type, (config.sequence, data, config.tensor), mesh_dim_names=AXES
    )


def part(batch: Tensor, mesh: DeviceMesh) -> Tensor:
    """What this rank reads of tokens, targets or others [B, T, ...]: [B / data, T / sequence, ...].

    Raises HopeError where that does not come out even.
    """
    for size, axis, name in zip(
        batch.shape[:2], ("data", "sequence"), ("rows", "tokens"), strict=True
    ):
        ranks = mesh[axis].size()
        require(size % ranks == 0, name, f"a multiple of the {ranks} {axis} ranks", size)
    rows = batch.chunk(mesh["data"].size(), 0)[mesh.get_local_rank("data")]
    return rows.chunk(mesh["sequence"].size(), 1)[mesh.get_local_rank("sequence")]
