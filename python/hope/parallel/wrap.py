"""A language model on a grid of processes, which trains as it does in one."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from hope.config import ParallelConfig
from hope.model import LanguageModel, parameter_shapes
from hope.optim.base import by_mesh
from hope.parallel.sequence import pass_states
from hope.parallel.tensor import share_layers


class Objective(nn.Module):
    """`model.loss` as a module: what DistributedDataParallel can stand around."""

    def __init__(self, model: LanguageModel, *, compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        self.loss = torch.compile(model.loss) if compiled else model.loss

    def forward(self, *batch: Tensor) -> Tensor:
        return self.loss(*batch)


def parallelize(
    model: LanguageModel, config: ParallelConfig, mesh: DeviceMesh, *, compiled: bool = False
) -> nn.Module:
    """Spreads `model`, which is changed in place, over a `make_mesh`; all ranks must hold the same.

    compiled: `model.loss` goes through torch.compile. The module returned gives the loss of this
    rank's `part` of tokens and targets. After its backward, every parameter's gradient is that of
    the mean loss over the whole batch. Optimizers are made afterwards, of `model.parameters()`.
    Raises HopeError where the heads or hidden units cannot be shared.
    """
    if config.tensor > 1:
        share_layers(model, mesh["tensor"])
    if config.sequence > 1:
        pass_states(model, mesh.get_group("sequence"))
    objective = Objective(model, compiled=compiled)
    if config.data == "fsdp":
        # The ranks of a sequence hold the same part of the weights: were they to gather each
        # other's, no rank could go on to the next block before the last one has come to this.
        shards = mesh["data"] if config.sequence == 1 else mesh["sequence", "data"]
        ranks = mesh["data"].size()
        for layer in (*model.blocks, model):
            fully_shard(layer, mesh=shards, shard_placement_fn=lambda p: _placement(p, ranks))
    elif mesh["data"].size() * mesh["sequence"].size() > 1:
        return DistributedDataParallel(objective, gradient_as_bucket_view=True)
    return objective


def _placement(parameter: nn.Parameter, ranks: int) -> Shard | None:
    """Along which dimension fully_shard cuts a parameter.

    The first one; but of [3, H * D, dim], which tensor ranks share, one that comes out even.
    """
    if not isinstance(parameter, DTensor):
        return None
    shape = parameter.to_local().shape
    taken = {p.dim for p in parameter.placements if isinstance(p, Shard)}
    even = (d for d, size in enumerate(shape) if d not in taken and size % ranks == 0)
    return Shard(next(even, 0))


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """`nn.utils.clip_grad_norm_` over the whole model, some of which is on other ranks.

    Scales the gradients in place to a norm of `limit` at most; returns the norm that they had, the
    same on all ranks.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norms = []
    for group in by_mesh(parameters):
        norm = nn.utils.get_total_norm([p.grad for p in group])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    norm = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
    for group in by_mesh(parameters):
        nn.utils.clip_grads_with_norm_(group, limit, norm)
    return norm


def whole(model: LanguageModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that belong to the model's parameters by name, gathered: as in one process.

    All ranks must call it. What is cut into the heads' parts of a joint projection is joined again.
    """
    shapes = parameter_shapes(model.config)
    return {
        name: (x.full_tensor() if isinstance(x, DTensor) else x).reshape(shapes[name])
        for name, x in tensors.items()
    }
