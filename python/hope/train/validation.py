"""What a model is judged by, and the dtype that it computes in."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hope.config import TrainConfig
from hope.data import SEPARATOR, validation_batches
from hope.model import LanguageModel

LN2 = math.log(2)  # nats in a bit


@torch.no_grad()
def bits_per_byte(model: LanguageModel, tokens: Tensor, config: TrainConfig) -> float:
    """The mean code length of a byte under the model, over fixed windows read from a fresh state.

    A document's end has to be coded too: its nats count, while only bytes are divided by.
    """
    device = model.embedding.weight.device
    nats, count = 0.0, 0
    batches = validation_batches(tokens, config.sequence, config.batch, config.validation_tokens)
    for inputs, targets in batches:
        with autocast(device, config):
            logits = model(inputs.to(device))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.to(device).flatten(), reduction="sum")
        nats += loss.item()
        count += int((targets != SEPARATOR).sum())
    return nats / count / LN2


def autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    """The context in which activations have the config's dtype."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")
