"""What a model is judged by, and the dtype that it computes in."""

import math

import torch
import torch.nn.functional as F

from hope.config import TrainConfig
from hope.data import IGNORED, Batch, Tokens, validation_batches
from hope.model import LanguageModel
from hope.tokenizers import BYTES, Tokenizer
from hope.train.ranks import Ranks

LN2 = math.log(2)  # nats in a bit


@torch.no_grad()
def bits_per_byte(
    model: LanguageModel,
    tokens: Tokens,
    config: TrainConfig,
    tokenizer: Tokenizer = BYTES,
    *,
    packed: bool = False,
    ranks: Ranks | None = None,
) -> float:
    """The mean code length of a byte under the model, over fixed windows read from a fresh state.

    A document's end has to be coded too: its nats count, while only bytes are divided by.
    ranks: among which the model is spread, each of which reads its part; all of them call this.
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
        rank=ranks.data_rank if ranks else 0,
        world=ranks.data if ranks else 1,
    )
    for rows in batches:
        batch = ranks.part(rows) if ranks else rows
        inputs, targets, cu_seqlens = batch.to(device)
        with autocast(device, config):
            logits = model(inputs, cu_seqlens=cu_seqlens)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        nats += loss.item()
        count += target_bytes(batch, tokenizer)
    if ranks:
        nats, count = ranks.sum(nats, count)
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
