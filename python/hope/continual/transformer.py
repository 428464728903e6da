"""A trained Transformer as the start of a model with a continuum memory system."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from hope.checkpoint import load_model
from hope.config import CmsConfig
from hope.errors import HopeError
from hope.model import LanguageModel

# A trained MLP starts with this much, e^-12, of its largest inner learning rate.
_HARDLY = -12.0


def from_transformer(source: LanguageModel | str | Path, cms: CmsConfig) -> LanguageModel:
    """A model with a continuum memory system that begins as a trained Transformer is.

    source: a model with `mlp="gelu"` (preset tiny-gelu, or any mixer with that MLP), or a run or
    checkpoint of one. The model that is returned is new, on the same device, in evaluation mode.

    The first level is the source's MLP, with its norm; all others (none in the nested form, which
    is one MLP) are as wide, and start with W2 = 0: they add nothing, but their W2 has a gradient.
    What a text would teach starts at nothing, too: the target is 0, which the new levels give
    already, and the trained MLP starts with e^-12 of its largest inner rate.

    So outputs are the source's; with `cms.updates` the trained MLP moves a little with every chunk,
    by that rate. New weights are drawn from torch's global generator. Raises HopeError where the
    source's MLP is another, or has another activation.
    """
    if not isinstance(source, LanguageModel):
        source = load_model(source)
    config = source.config
    if config.cms is not None or config.mlp != "gelu":
        got = "a CMS" if config.cms is not None else repr(config.mlp)
        raise HopeError(f"source must have model.mlp 'gelu', which a level can begin as, not {got}")
    if cms.activation != config.mlp:
        raise HopeError(
            f"cms.activation must be {config.mlp!r}, the source's, not {cms.activation!r}"
        )
    # So wide that each level is as wide as the source's MLP.
    ratio = config.mlp_dim * cms.mlps / config.dim
    model = LanguageModel(replace(config, cms=cms, mlp_ratio=ratio))
    weights = {
        name.replace(".mlp_norm.", ".cms.levels.0.norm.").replace(".mlp.", ".cms.levels.0.mlp."): w
        for name, w in source.state_dict().items()
    }
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    assert not unknown, unknown
    for block in model.blocks:
        _start_with_nothing(block.cms)
    return model.to(source.embedding.weight.device).eval()


@torch.no_grad()
def _start_with_nothing(memory: nn.Module) -> None:
    """Makes a memory give what its first level gives, before and after it has learned."""
    for level in memory.levels[1:]:
        level.mlp.down.weight.zero_()
    if memory.config.updates:
        memory.target.weight.zero_()
        trained = len(memory.rates) if memory.config.variant == "nested" else 1
        for rate in memory.rates[:trained]:
            rate.weight.zero_()
            rate.bias.fill_(_HARDLY)
