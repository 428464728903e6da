"""Layers shared by ranks: each has some of the heads, or of an MLP's hidden units."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from hope.config import ModelConfig
from hope.config.check import require
from hope.errors import HopeError
from hope.layers import (
    MLP,
    Attention,
    ContinuumMemory,
    SelfModifyingMemory,
    SwiGLU,
    TitansMemory,
)
from hope.model import LanguageModel


@dataclass(frozen=True)
class Cut:
    """How a parameter is cut: along `dim`, after its first dimension was seen as `fused` blocks.

    A projection to q, k and v is three matrices one below the other, and a rank has its heads' rows
    of each: as [3, H * D, dim] it is cut along dimension 1.
    """

    dim: int = 0
    fused: int = 1


_HEADS = Cut()  # [H, ...]
_INPUTS = Cut(dim=1)  # [dim, H * D] or [dim, hidden]: its product with a part is a term of a sum


def _blocks(count: int) -> Cut:
    return Cut(dim=1, fused=count)


# The cuts of each layer's parameters, by the beginning of their names. All of them are in a table:
# a parameter that is not is an error, because it would be wrong on every rank.
_CUTS: dict[type[nn.Module], dict[str, Cut]] = {
    TitansMemory: {
        "qkv.": _blocks(3),
        "conv.": _blocks(3),
        "rates.": _blocks(4),
        "memory.": _HEADS,
        "norm_": _HEADS,
        "out.": _INPUTS,
    },
    SelfModifyingMemory: {
        "qx.": _blocks(2),
        "conv.": _blocks(2),
        "gate.": _HEADS,
        "memories.": _HEADS,
        "lr_bias": _HEADS,
        "retention_bias": _HEADS,
        "out.": _INPUTS,
    },
    Attention: {"qkv.": _blocks(3), "conv.": _blocks(3), "out.": _INPUTS},
    SwiGLU: {"gate.": _HEADS, "up.": _HEADS, "down.": _INPUTS},
    MLP: {"up.": _HEADS, "down.": _INPUTS},
}


class Split(ParallelStyle):
    """A layer y = f(x) that is a sum over its heads or hidden units, of which each rank has some.

    Its parameters become DTensors, cut by the table of its class. While it runs, it sees its own
    part of them as plain tensors: kernels know nothing of ranks. x and y [B, T, dim] are the same
    on all ranks: y is the sum of the parts (an all-reduce), and so is x's gradient.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.mesh = device_mesh
        self.cuts: list[tuple[nn.Module, str, Cut]] = []
        for name, parameter in list(module.named_parameters()):
            cut = _cut_of(type(module), name)
            owner_name, _, leaf = name.rpartition(".")
            owner = module.get_submodule(owner_name)
            whole = parameter.detach()
            if cut.fused > 1:
                whole = whole.unflatten(0, (cut.fused, -1))
            part = distribute_tensor(
                whole, device_mesh, [Shard(cut.dim)], src_data_rank=self.src_data_rank
            )
            owner.register_parameter(leaf, nn.Parameter(part))
            self.cuts.append((owner, leaf, cut))
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)
        return module

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self.whole = [owner._parameters[leaf] for owner, leaf, _ in self.cuts]
        for (owner, leaf, cut), parameter in zip(self.cuts, self.whole, strict=True):
            part = parameter.to_local()
            owner._parameters[leaf] = part.flatten(0, 1) if cut.fused > 1 else part
        x, *rest = args
        x = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        return x.to_local(grad_placements=[Partial()]), *rest

    def _leave(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        for (owner, leaf, _), parameter in zip(self.cuts, self.whole, strict=True):
            owner._parameters[leaf] = parameter
        if result is None:  # the layer has raised an error
            return None
        if isinstance(result, tuple):  # a mixer's, with its state
            return self._sum(result[0]), *result[1:]
        return self._sum(result)

    def _sum(self, y: Tensor) -> Tensor:
        y = DTensor.from_local(y, self.mesh, [Partial()], run_check=False)
        return y.redistribute(placements=[Replicate()]).to_local()


def _cut_of(layer: type[nn.Module], name: str) -> Cut:
    for beginning, cut in _CUTS[layer].items():
        if name.startswith(beginning):
            return cut
    raise KeyError(f"{layer.__name__}.{name} has no cut in the table")


def check_tensor(config: ModelConfig, ranks: int) -> None:
    """HopeError where a model's layers cannot be shared by this many ranks."""
    mixer = config.mixer
    if ranks > 1 and mixer.kind not in ("titans", "hope", "attention"):
        raise HopeError(
            "parallel.tensor must be 1 with model.mixer.kind "
            f"{mixer.kind!r} (its norms and projections mix the heads), not {ranks}"
        )
    widths = () if config.cms is not None and config.cms.updates else config.mlp_dims
    for name, count in [("model.mixer.heads", mixer.heads), *(("the MLP", w) for w in widths)]:
        require(count % ranks == 0, "parallel.tensor", f"a divisor of {name} ({count})", ranks)


def share_layers(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Shares the heads of mixers and the hidden units of MLPs by the ranks of a 1-D mesh.

    All ranks must hold the same weights. Norms and the embedding stay whole on every rank, and so
    does a continuum memory system that a text rewrites: a half of its hidden units would need the
    whole answer, a sum over ranks, before every update, for a layer that takes as long as an MLP.
    """
    ranks = mesh.size()
    check_tensor(model.config, ranks)
    for block in model.blocks:
        parallelize_module(block.mixer, mesh, Split(), src_data_rank=None)
        heads = block.mixer.config.heads // ranks  # how many the layer has here
        block.mixer.config = replace(block.mixer.config, heads=heads)
        for mlp in _mlps(block):
            parallelize_module(mlp, mesh, Split(), src_data_rank=None)


def _mlps(block: nn.Module) -> list[nn.Module]:
    memory: ContinuumMemory | None = block.cms
    if memory is None:
        return [block.mlp]
    return [] if memory.config.updates else [level.mlp for level in memory.levels]
