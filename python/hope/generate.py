"""Writing text, token by token, with the model's carried state."""

import codecs
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from hope.errors import HopeError
from hope.model import LanguageModel
from hope.tokenizers import BYTES, Tokenizer


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt: bytes | str = b"",
    *,
    length: int = 400,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int | None = None,
    tokenizer: Tokenizer = BYTES,
) -> Iterator[int]:
    """Yields up to `length` tokens (with the default tokenizer: bytes) that continue `prompt`;
    fewer where the model ends the document. `decode` makes text of them.

    The prompt is read in one chunked forward pass; every further token costs one step from the
    carried state, which for a memory takes the same time and space however long the text is.

    temperature: 0 takes the likeliest token. top_k: sample among the k likeliest. seed: makes the
    text repeatable. tokenizer: the one that the model was trained with (hope.load_tokenizer).
    """
    if length < 0:
        raise HopeError(f"length must be at least 0, not {length}")
    if not 0 <= temperature < float("inf"):
        raise HopeError(f"temperature must be at least 0, not {temperature}")
    if top_k is not None and top_k < 1:
        raise HopeError(f"top_k must be at least 1, not {top_k}")
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise HopeError(f"seed must be a number of 64 bits, not {seed}")
    device = model.embedding.weight.device
    random = torch.Generator(device)
    if seed is None:
        random.seed()
    else:
        random.manual_seed(seed)
    try:
        text = prompt.encode() if isinstance(prompt, str) else prompt
    except UnicodeEncodeError as error:
        raise HopeError(f"prompt must be text in UTF-8, not {prompt!a}") from error
    if model.config.vocab_size < tokenizer.vocab_size:
        raise HopeError(
            f"tokenizer has {tokenizer.vocab_size:,} tokens, but the model knows "
            f"{model.config.vocab_size:,}: it was trained with another"
        )
    tokens = torch.tensor([[tokenizer.separator, *tokenizer.encode(text).tolist()]], device=device)
    state = None
    for _ in range(length):
        logits, state = model(tokens, state, return_state=True)
        token = choose(logits[0, -1, : tokenizer.vocab_size], temperature, top_k, random)
        if token == tokenizer.separator:
            return
        yield int(token)
        tokens = token.view(1, 1)


def choose(
    logits: Tensor, temperature: float, top_k: int | None, random: torch.Generator
) -> Tensor:
    """One token [] from logits [V]."""
    if temperature == 0:
        return logits.argmax()
    if top_k is not None:
        least = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    # The largest logit is moved to 0 first, so that a small temperature cannot overflow.
    probabilities = ((logits - logits.max()) / temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=random)[0]


def decode(tokens: Iterable[int], tokenizer: Tokenizer = BYTES) -> Iterator[str]:
    """The text of a stream of tokens, as soon as it is complete; wrong UTF-8 becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if piece := decoder.decode(tokenizer.decode([token])):
            yield piece
    if piece := decoder.decode(b"", final=True):
        yield piece
