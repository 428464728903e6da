"""The tokenizer of byte-level runs."""

from transformers import AddedToken, PreTrainedTokenizer

from hope.data import SEPARATOR

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
        pad_token: str | AddedToken = "<|pad|>",
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
