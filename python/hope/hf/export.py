"""From a run of ours to a directory that transformers reads."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from hope.checkpoint import find_checkpoint, load_model
from hope.errors import HopeError
from hope.files import atomic_directory
from hope.hf.model import HopeForCausalLM
from hope.hf.tokenizer import HopeByteTokenizer, fast_tokenizer
from hope.tokenizers import BYTES, load_tokenizer


def from_run(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[HopeForCausalLM, PreTrainedTokenizerBase]:
    """The model of a run (its newest checkpoint) or of one checkpoint, and its tokenizer.

    The model is in evaluation mode. Its generation config ends a text at the separator, and never
    writes an id that stands for nothing, so that `generate` writes what `hope.generate` does.
    """
    checkpoint = find_checkpoint(Path(path))
    model, ours = load_model(checkpoint, device), load_tokenizer(checkpoint)
    size = model.config.vocab_size
    if size < ours.vocab_size:
        raise HopeError(
            f"{checkpoint}: vocab_size must be at least {ours.vocab_size}, the tokenizer's, "
            f"not {size}"
        )
    if ours is BYTES:
        tokenizer = HopeByteTokenizer()
    else:
        tokenizer = fast_tokenizer(checkpoint / "tokenizer.json", ours.separator)
    padding = tokenizer.pad_token_id
    wrapper = HopeForCausalLM.from_language_model(
        model,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # What ends a batch's shorter texts is read, unlike padding in front: it needs an id.
        pad_token_id=padding if padding < size else tokenizer.eos_token_id,
    )
    unused = list(range(ours.vocab_size, size))
    wrapper.generation_config.suppress_tokens = unused or None
    return wrapper, tokenizer


def export(path: str | Path, out: str | Path) -> None:
    """Writes the run or checkpoint `path` to the directory `out`, for `from_pretrained`.

    Raises HopeError where `path` holds no model, or `out` is something already.
    """
    if Path(out).exists():
        raise HopeError(f"{out} exists already; export to a new directory")
    model, tokenizer = from_run(path)
    with atomic_directory(Path(out)) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
