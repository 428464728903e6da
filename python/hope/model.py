"""The language model: embedding, blocks of a mixer and an MLP or CMS, tied head."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import register_dataclass
from torch.utils.checkpoint import checkpoint

from hope.config import ModelConfig
from hope.layers import MIXERS, AttentionState, CmsStates, ContinuumMemory, MixerState, make_mlp


@dataclass
class ModelState:
    """What a LanguageModel carries from one call to the next: the states of its layers.

    layers: of every block's mixer. cms: of every block's continuum memory system, a state for each
    level; none of MLPs that a text does not rewrite.
    """

    layers: tuple[MixerState, ...]
    cms: tuple[CmsStates, ...]

    def detach(self) -> "ModelState":
        """The same state cut from the autograd graph."""
        return ModelState(
            tuple(layer.detach() for layer in self.layers),
            tuple(tuple(level.detach() for level in levels) for levels in self.cms),
        )

    def compact(self) -> "ModelState":
        """The same state after packed documents, without the slots of attention's that they leave.

        Waits for the device. (Nothing else grows with a text, or leaves anything.)
        """
        layers = (
            layer.compact() if isinstance(layer, AttentionState) else layer for layer in self.layers
        )
        return ModelState(tuple(layers), self.cms)


register_dataclass(ModelState)


class Block(nn.Module):
    """`x + mixer(norm(x))`, then `x + mlp(norm(x))` or a continuum memory system; x [B, T, dim]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mixer = MIXERS[type(config.mixer)](config.dim, config.mixer)
        if config.cms is None:
            self.mlp_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
            self.mlp = make_mlp(config)
            self.cms = None
        else:
            self.cms = ContinuumMemory(config)

    def writers(self) -> list[nn.Linear]:
        """The layers that write into the residual stream (or, of a CMS, say what to write)."""
        return [self.mixer.out, *([self.mlp.down] if self.cms is None else self.cms.writers())]

    def forward(
        self,
        x: Tensor,
        state: MixerState | None,
        levels: CmsStates | None,
        cu_seqlens: Tensor | None,
        *,
        return_levels: bool = True,
    ) -> tuple[Tensor, MixerState, CmsStates]:
        """return_levels: False spares a CMS what it would learn from its last chunks."""
        y, state = self.mixer(self.mixer_norm(x), state, cu_seqlens)
        x = x + y
        if self.cms is None:
            return x + self.mlp(self.mlp_norm(x)), state, ()
        x, levels = self.cms(x, levels, cu_seqlens, return_states=return_levels)
        return x, state, levels


class LanguageModel(nn.Module):
    """Next-token model over `config.vocab_size` tokens.

    Weights are drawn from torch's global generator; on the meta device nothing is.

    checkpoint_activations: False; True keeps only what goes into a block for the backward pass,
    which computes the rest again. Gradients are the same.
    """

    checkpoint_activations = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.init_weights()

    def init_weights(self) -> None:
        """Draws all weights anew.

        Linear layers keep the scale of their input (standard deviation 1 / sqrt(fan-in)); those
        that write into the residual stream, the mixer's and each MLP's, are divided by the root of
        their number, so that the stream's variance does not grow with depth. The embedding has
        standard deviation 1 / sqrt(dim): as the head it gives logits of scale 1, and on the way in
        it is scaled back up to 1 (see forward).
        """
        nn.init.normal_(self.embedding.weight, std=self.config.dim**-0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        count = self.config.layers * (1 + len(self.config.mlp_dims))
        for block in self.blocks:
            block.mixer.init_weights()
            if block.cms is not None:
                block.cms.init_weights()
            for writer in block.writers():
                with torch.no_grad():
                    writer.weight.mul_(count**-0.5)

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, ModelState]:
        """Logits [B, T, vocab_size] in float32 for tokens [B, T] int64, T >= 1.

        state: from an earlier call, to continue its text. cu_seqlens: int32 [N + 1], packed
        documents (B = 1).
        return_state: also returns the state after the last token. Raises ValueError on a wrong
        shape or state.
        """
        x, state = self.features(tokens, state, cu_seqlens, return_state=return_state)
        logits = self.head(x)
        return (logits, state) if return_state else logits

    def features(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        return_state: bool = True,
        call: Callable[..., Any] | None = None,
    ) -> tuple[Tensor, ModelState]:
        """What the head reads, [B, T, dim], and the state after the last token; as `forward`.

        return_state: False spares the work that only the state would show; no text can go on from
        the one that comes back.
        call: calls a block, `call(block, *its arguments)`, such as torch.utils.checkpoint, which is
        what `checkpoint_activations` stands for.
        """
        if tokens.ndim != 2 or tokens.shape[1] == 0 or tokens.dtype != torch.int64:
            got = f"{tuple(tokens.shape)} {tokens.dtype}"
            raise ValueError(f"tokens must be [B, T] int64 with T >= 1, not {got}")
        if cu_seqlens is not None and tokens.shape[0] != 1:
            raise ValueError(f"cu_seqlens needs a batch of 1, not {tokens.shape[0]}")
        if state is not None and not len(state.layers) == len(state.cms) == len(self.blocks):
            got = len(state.layers)
            raise ValueError(f"state must hold {len(self.blocks)} layers, not {got}")
        x = self.embedding(tokens) * self.config.dim**0.5
        carried = [(None, None)] * len(self.blocks)
        if state is not None:
            carried = list(zip(state.layers, state.cms, strict=True))
        if call is None and self.checkpoint_activations:
            call = partial(checkpoint, use_reentrant=False)
        layers, cms = [], []
        for block, before in zip(self.blocks, carried, strict=True):
            made = (block, x, *before, cu_seqlens) if call is not None else (x, *before, cu_seqlens)
            x, layer, levels = (call or block)(*made, return_levels=return_state)
            layers.append(layer)
            cms.append(levels)
        return self.norm(x), ModelState(tuple(layers), tuple(cms))

    def head(self, x: Tensor) -> Tensor:
        """Logits [..., vocab_size] in float32 of features [..., dim]."""
        return F.linear(x, self.embedding.weight).float()

    def loss(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mean negative log-likelihood in nats of targets [B, T] int64, a scalar.

        Targets of -100 are left out. cu_seqlens: of packed documents, as in `forward`.
        """
        logits = self(tokens, cu_seqlens=cu_seqlens)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """The shapes of a model's weights by name (the tied embedding once), without allocating them.

    In a model that is shared by tensor ranks, those of the same names may be viewed in another way.
    """
    with torch.device("meta"):
        model = LanguageModel(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def parameter_count(config: ModelConfig) -> int:
    """Number of trainable scalars."""
    return sum(shape.numel() for shape in parameter_shapes(config).values())
