"""A model's configuration as transformers keeps it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from hope.config import ModelConfig, from_dict, to_dict
from hope.errors import HopeError

_FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))


class HopeLMConfig(PreTrainedConfig):
    """The fields of a ModelConfig in their JSON form, each an attribute and a key of config.json.

        HopeLMConfig(preset("tiny").model)
        HopeLMConfig(dim=64, layers=2, mixer={"kind": "titans", "heads": 2})

    model: a ModelConfig or its JSON form; keywords replace its fields. Other keywords are those of
    PreTrainedConfig, which keeps names that it does not know as attributes. `hidden_size` and
    `num_hidden_layers` are other names of `dim` and `layers`.

    Raises HopeError for values that no ModelConfig has.
    """

    model_type = "hope"
    attribute_map = {"hidden_size": "dim", "num_hidden_layers": "layers"}  # noqa: RUF012
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012

    def __init__(
        self,
        model: ModelConfig | Mapping[str, Any] | None = None,
        *,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        if not tie_word_embeddings:
            raise HopeError("tie_word_embeddings must be True: the head is the embedding")
        if isinstance(model, ModelConfig):
            model = to_dict(model)
        for other, name in self.attribute_map.items():
            if other in kwargs:
                kwargs.setdefault(name, kwargs.pop(other))
        fields = {name: kwargs.pop(name) for name in _FIELDS if name in kwargs}
        fields = to_dict(from_dict(ModelConfig, {**(model or {}), **fields}))
        super().__init__(**kwargs)
        for name, value in fields.items():
            setattr(self, name, value)
        self.use_cache = use_cache
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = True

    def __eq__(self, other: object) -> bool:
        # That of the dataclass which transformers makes of this class would leave our fields out.
        return PreTrainedConfig.__eq__(self, other)

    __hash__ = None  # it can be changed

    def to_model_config(self) -> ModelConfig:
        """Our own form of it; HopeError where an attribute has a value that it cannot have."""
        return from_dict(ModelConfig, {name: getattr(self, name) for name in _FIELDS})
