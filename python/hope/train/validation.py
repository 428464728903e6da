"""What a model is judged by, and the dtype that it computes in."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hope.config import TrainConfig
from hope.data import SEPARATOR, validation_batches
from hope.model import LanguageModel
from hope.train.ranks import Ranks

LN2 = math.log(2)  # nats in a bit


@torch.no_grad()
def bits_per_byte(
    model: LanguageModel, tokens: Tensor, config: TrainConfig, ranks: Ranks | None = None
) -> float:
    """The mean code length of a byte under the model, over fixed windows read from a fresh state.

    A document's end has to be coded too: its nats count, while only bytes are divided by.
    ranks: among which the model is spread, each of which reads its part; all of them call this.
    """
    device = model.embedding.weight.device
    nats, count = 0.0, 0
    batches = validation_batches(tokens, config.sequence, config.batch, config.validation_tokens)
    for batch in batches:
        inputs, targets = map(ranks.part, batch) if ranks else batch
        with autocast(device, config):
            logits = model(inputs.to(device))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.to(device).flatten(), reduction="sum")
        nats += loss.item()
        count += int((targets != SEPARATOR).sum())
    if ranks:
        nats, count = ranks.sum(nats), ranks.sum(count)
    return nats / count / LN2


def autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    """The context in which activations have the config's dtype."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")
