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


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """The processes that torchrun started, joined; gives the device of this one.

    On CPUs by gloo, on GPUs by NCCL: every process has the GPU of its place on its machine. What
    started the processes may have joined them already, as Ray Train does: they stay joined.
    """
    if device.type == "cuda":
        place = int(os.environ.get("LOCAL_RANK", "0"))
        count = torch.cuda.device_count()
        require(place < count, "torchrun --nproc-per-node", f"at most {count}, the GPUs", place + 1)
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
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
    return columns(_share(batch, mesh, "data", "rows", 0), mesh)


def columns(rows: Tensor, mesh: DeviceMesh) -> Tensor:
    """What this rank reads of its rows [B, T, ...]: [B, T / sequence, ...]."""
    return _share(rows, mesh, "sequence", "tokens", 1)


def _share(x: Tensor, mesh: DeviceMesh, axis: str, name: str, dim: int) -> Tensor:
    size, ranks = x.shape[dim], mesh[axis].size()
    require(size % ranks == 0, name, f"a multiple of the {ranks} {axis} ranks", size)
    return x.chunk(ranks, dim)[mesh.get_local_rank(axis)]
