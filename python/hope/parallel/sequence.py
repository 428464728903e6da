"""Sequences longer than a process: each rank reads a part, and hands the memories on.

Before a block, a rank receives the block's state from the rank that read the tokens before; after
it, it sends its own to the next one. In the backward the gradients of the states take the same way
back. So a block of a later part starts when the block of the part before is done: with L blocks and
S ranks a step takes the time of L + S - 1 blocks of a part, instead of S * L.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hope.layers import ContinuumMemory, SelfModifyingMemory
from hope.layers.memory import NeuralMemory
from hope.model import Block, LanguageModel


@dataclass
class Relay:
    """This rank's place among those that read one text, `group` in the order of its parts."""

    group: dist.ProcessGroup
    # The states that arrive at a block and leave it, on the meta device, for every form of its
    # input: told once by the rank that sends, because all parts of a text have the same shape.
    forms: dict[Any, Any] = field(default_factory=dict)
    works: list[dist.Work] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)  # what is on its way
    # In the model's forward. A block that runs at another time does so for its backward, to compute
    # its activations again (train.checkpoint_activations): of what arrived the first time.
    running: bool = False
    arrived: dict[int, list[Tensor]] = field(default_factory=dict)  # at which block

    @property
    def first(self) -> bool:
        return self.group.rank() == 0

    @property
    def last(self) -> bool:
        return self.group.rank() == self.group.size() - 1

    def send(self, tensors: list[Tensor], step: int) -> None:
        """Sends to the next rank (step 1) or the one before (-1), without waiting."""
        tensors = [tensor.detach().contiguous() for tensor in tensors]
        self.works += self._exchange(dist.isend, tensors, step)
        self.kept += tensors

    def receive(self, like: list[Tensor], device: torch.device, step: int) -> list[Tensor]:
        """Tensors of these shapes and dtypes from the rank at `step`."""
        tensors = [torch.empty(x.shape, dtype=x.dtype, device=device) for x in like]
        for work in self._exchange(dist.irecv, tensors, step):
            work.wait()
        return tensors

    def flush(self) -> None:
        """Waits until all that was sent is on its way: what nobody holds any more never arrives."""
        for work in self.works:
            work.wait()
        self.works.clear()
        self.kept.clear()

    def begin(self) -> None:
        self.arrived.clear()
        self.running = True

    def end(self) -> None:
        self.running = False
        if not torch.is_grad_enabled():  # no backward will come
            self.arrived.clear()
        self.flush()

    def at(self, number: int, like: list[Tensor], device: torch.device) -> list[Tensor]:
        """What the rank before has sent to a block."""
        if self.running:
            self.arrived[number] = self.receive(like, device, step=-1)
        return self.arrived[number]

    def announce(self, key: Any, state: Any) -> None:
        """Tells the next rank once what the states that follow look like."""
        if ("sent", key) not in self.forms:
            form = pytree.tree_map_only(Tensor, lambda leaf: leaf.detach().to("meta"), state)
            dist.send_object_list([form], group=self.group, group_dst=self.group.rank() + 1)
            self.forms["sent", key] = form

    def announced(self, key: Any) -> Any:
        """What the rank before has told."""
        if ("received", key) not in self.forms:
            box = [None]
            dist.recv_object_list(box, group=self.group, group_src=self.group.rank() - 1)
            self.forms["received", key] = box[0]
        return self.forms["received", key]

    def _exchange(self, op: Any, tensors: list[Tensor], step: int) -> list[dist.Work]:
        peer = self.group.rank() + step
        ops = [dist.P2POp(op, tensor, group=self.group, group_peer=peer) for tensor in tensors]
        return dist.batch_isend_irecv(ops) if ops else []


class _Send(torch.autograd.Function):
    """Sends the leaves of a state on; x [B, T, dim] passes, and waits for their gradients."""

    @staticmethod
    def forward(ctx: Any, relay: Relay, x: Tensor, *leaves: Tensor) -> Tensor:
        ctx.relay, ctx.device = relay, x.device
        ctx.forms = [leaf.to("meta") for leaf in leaves]
        if relay.running:
            relay.send(list(leaves), step=1)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor | None, ...]:
        grads = iter(ctx.relay.receive(_floating(ctx.forms), ctx.device, step=1))
        return None, d_x, *(next(grads) if x.is_floating_point() else None for x in ctx.forms)


class _Receive(torch.autograd.Function):
    """x and the leaves of the state that the rank before has sent; their gradients go back there.

    starts: parameters of which this part of a text makes no use, because the state has taken their
    place. Their gradient is zero rather than missing: all ranks have one of every parameter.
    """

    @staticmethod
    def forward(
        ctx: Any, relay: Relay, number: int, forms: list[Tensor], x: Tensor, *starts: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.relay, ctx.number, ctx.starts = relay, number, starts
        leaves = relay.at(number, forms, x.device)
        ctx.mark_non_differentiable(*(leaf for leaf in leaves if not leaf.is_floating_point()))
        return x.view_as(x), *leaves

    @staticmethod
    def backward(ctx: Any, d_x: Tensor, *d_leaves: Tensor) -> tuple[Tensor | None, ...]:
        ctx.relay.arrived.pop(ctx.number, None)
        ctx.relay.send(_floating(d_leaves), step=-1)
        if ctx.number == 0:
            ctx.relay.flush()
        return None, None, None, d_x, *map(torch.zeros_like, ctx.starts)


def _floating(tensors: Any) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def pass_states(model: LanguageModel, group: dist.ProcessGroup) -> Relay:
    """Makes every block of `model` read on where the rank before in `group` has stopped.

    The model is then called with this rank's part of every text, [B, T], T the same on all ranks,
    and without a state or packed documents.
    """
    relay = Relay(group)
    dist.barrier(group)  # NCCL wants the first call in a group to be one of all its ranks
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(_Before(relay, number), with_kwargs=True)
        block.register_forward_hook(_After(relay, number))
    model.register_forward_pre_hook(lambda *_: relay.begin())
    model.register_forward_hook(lambda *_: relay.end())
    return relay


@dataclass
class _Before:
    relay: Relay
    number: int

    def __call__(
        self, block: Block, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, state, levels, cu_seqlens = args
        if not self.relay.last:  # what nobody here asks for, the next rank does
            options = {**options, "return_levels": True}
        if state is not None or cu_seqlens is not None:
            got = "a state" if cu_seqlens is None else "cu_seqlens"
            raise ValueError(f"sequence ranks take the tokens of one text each row, without {got}")
        if self.relay.first:
            return args, options
        leaves, structure = pytree.tree_flatten(self.relay.announced(_key(self.number, x)))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        starts = [p for p in _starts(block) if p.requires_grad]
        forms = [leaves[i] for i in places]
        x, *received = _Receive.apply(self.relay, self.number, forms, x, *starts)
        for i, leaf in zip(places, received, strict=True):
            leaves[i] = leaf
        state, levels = pytree.tree_unflatten(leaves, structure)
        return (x, state, levels, None), options


@dataclass
class _After:
    relay: Relay
    number: int

    def __call__(self, block: Block, args: tuple[Any, ...], result: tuple[Any, ...]) -> Any:
        if self.relay.last:
            return None
        x, state, levels = result
        self.relay.announce(_key(self.number, x), (state, levels))
        leaves = [leaf for leaf in pytree.tree_leaves((state, levels)) if isinstance(leaf, Tensor)]
        return _Send.apply(self.relay, x, *leaves), state, levels


def _key(number: int, x: Tensor) -> tuple[Any, ...]:
    return number, x.shape, x.dtype, torch.is_autocast_enabled(x.device.type)


def _starts(block: Block) -> list[nn.Parameter]:
    """The parameters with which a text starts, and which its later parts do not use."""
    starts: list[nn.Parameter] = []
    for module in block.modules():
        if isinstance(module, NeuralMemory):
            starts += module.memory.parameters()
        elif isinstance(module, SelfModifyingMemory):
            starts += module.memories.parameters()
        elif isinstance(module, ContinuumMemory) and module.config.updates:
            starts += [p for level in module.levels for p in level.mlp.parameters()]
    return starts
