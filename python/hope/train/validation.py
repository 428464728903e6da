"""What a model is judged by, and the dtype that it computes in."""

import math

import torch
import torch.nn.functional as F

from hope.config import TrainConfig
from hope.data import IGNORED, Batch, Tokens, validation_batches
from hope.model import LanguageModel
from hope.tokenizers import BYTES, Tokenizer

LN2 = math.log(2)  # nats in a bit


@torch.no_grad()
def bits_per_byte(
    model: LanguageModel,
    tokens: Tokens,
    config: TrainConfig,
    tokenizer: Tokenizer = BYTES,
    *,
    packed: bool = False,
) -> float:
    """The mean code length of a byte under the model, over fixed windows read from a fresh state.

    A document's end has to be coded too: its nats count, while only bytes are divided by.
    """
    device = model.embedding.weight.device
    nats, count = 0.0, 0
    batches = validation_batches(
        tokens,
        config.sequence,
        config.batch,
        config.validation_tokens,
        packed=packed,
        separator=tokenizer.separator,
    )
    for batch in batches:
        inputs, targets, cu_seqlens = batch.to(device)
        with autocast(device, config):
            logits = model(inputs, cu_seqlens=cu_seqlens)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        nats += loss.item()
        count += target_bytes(batch, tokenizer)
    return nats / count / LN2


def target_count(batch: Batch) -> int:
    """How many targets of a batch (on the CPU) count."""
    return int((batch.targets != IGNORED).sum())


def target_bytes(batch: Batch, tokenizer: Tokenizer) -> int:
    """How many bytes of text they are."""
    targets = batch.targets[batch.targets != IGNORED]
    return int(tokenizer.byte_counts[targets].sum())


def autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    """The context in which activations have the config's dtype."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")
