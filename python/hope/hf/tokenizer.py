"""The tokenizers of runs: of bytes, and those with a tokenizer.json."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, PreTrainedTokenizer, PreTrainedTokenizerFast

from hope.tokenizers import SEPARATOR

_PAD_NAME = "<|pad|>"
_PAD = SEPARATOR + 1  # in no text: the first of the ids that fill a model's vocabulary up


class HopeByteTokenizer(PreTrainedTokenizer):
    """Ids are bytes of UTF-8; the separator, 256, stands before a document and so ends the last.

    It is the beginning (`bos`) that is put before every text, as `hope.generate` does, and the end
    (`eos`) at which generation stops. 257 is padding, on the left. No text is taken for a special
    token, whatever it says: all texts come back as they were. Bytes that are not UTF-8 are decoded
    to U+FFFD.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        bos_token: str | AddedToken = "<|separator|>",
        eos_token: str | AddedToken = "<|separator|>",
        pad_token: str | AddedToken = _PAD_NAME,
        **kwargs,
    ) -> None:
        self._added_tokens_decoder = {
            SEPARATOR: AddedToken(str(bos_token), special=True, normalized=False),
            _PAD: AddedToken(str(pad_token), special=True, normalized=False),
        }
        kwargs.setdefault("padding_side", "left")
        kwargs.setdefault("split_special_tokens", True)
        kwargs.setdefault("special_tokens_pattern", "bos")
        super().__init__(bos_token=bos_token, eos_token=eos_token, pad_token=pad_token, **kwargs)

    @property
    def vocab_size(self) -> int:
        """The bytes."""
        return SEPARATOR

    def get_vocab(self) -> dict[str, int]:
        """Ids of tokens; a byte's token is the character of its number."""
        return {chr(byte): byte for byte in range(SEPARATOR)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int | None:
        return ord(token) if len(token) == 1 and ord(token) < SEPARATOR else None

    def _convert_id_to_token(self, index: int) -> str:
        return (
            chr(index) if index < SEPARATOR else f"<|{index}|>"
        )  # an unused id, of an untrained model

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens; special ones by their names."""
        parts = (
            token.encode("latin-1")
            if len(token) == 1 and ord(token) < SEPARATOR
            else token.encode()
            for token in tokens
        )
        return b"".join(parts).decode(errors="replace")

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        return ()  # there is nothing to know


def fast_tokenizer(file: Path, separator: int) -> PreTrainedTokenizerFast:
    """The tokenizer.json of a run, of which `hope.tokenizers` has read that it can be used.

    Like HopeByteTokenizer: the separator stands before every text and ends generation, padding is
    on the left and a token of its own, and no text is taken for a special token.
    """
    tokenizer = Tokenizer.from_file(str(file))
    name = tokenizer.id_to_token(separator)
    tokenizer.post_processor = TemplateProcessing(
        single=[name, "$A"], pair=[name, "$A", name, "$B"], special_tokens=[(name, separator)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=name,
        eos_token=name,
        pad_token=_PAD_NAME,
        padding_side="left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
