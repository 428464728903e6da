"""Our language model as a PreTrainedModel of transformers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from hope.errors import HopeError
from hope.hf.cache import HopeCache
from hope.hf.config import HopeLMConfig
from hope.model import LanguageModel, ModelState

_IGNORED = -100  # the label that does not count, in all of transformers


class HopeForCausalLM(PreTrainedModel, GenerationMixin):
    """A `hope.LanguageModel`, its weights under `model.`, with the head tied to the embedding.

    Batches may be padded on either side, or anywhere: with an `attention_mask` every row is read as
    the text that its ones make up, just as it would be alone. Generation needs padding on the left.
    Assisted decoding is refused, because a memory cannot be rolled back.
    """

    config: HopeLMConfig
    base_model_prefix = "model"
    _input_embed_layer = "embedding"
    _no_split_modules = ["Block"]  # noqa: RUF012
    _is_stateful = True
    _supports_context_parallel = False
    supports_gradient_checkpointing = True

    def __init__(self, config: HopeLMConfig) -> None:
        super().__init__(config)
        self.model = LanguageModel(config.to_model_config())
        self.gradient_checkpointing = False
        for parameter in self.model.parameters():
            # Drawn, except on the meta device: post_init and loading draw those that are not.
            parameter._is_hf_initialized = not parameter.is_meta
        self.post_init()

    @classmethod
    def from_language_model(cls, model: LanguageModel, **config: Any) -> "HopeForCausalLM":
        """A wrapper of `model`, with which it shares the weights; config: see HopeLMConfig."""
        with torch.device("meta"):
            wrapper = cls(HopeLMConfig(model.config, **config))
        wrapper.model = model
        return wrapper.train(model.training)

    def initialize_weights(self) -> None:
        """Draws the weights that a file has not given: all, or those that it lacks.

        (Ours are not drawn module by module, as those of transformers: see LanguageModel.)
        """
        missing = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if not getattr(parameter, "_is_hf_initialized", False)
        }
        if not missing:
            return
        drawn = dict(LanguageModel(self.config.to_model_config()).named_parameters())
        with torch.no_grad():
            for name, parameter in missing.items():
                parameter.copy_(drawn[name])
                parameter._is_hf_initialized = True

    def _init_weights(self, module: nn.Module) -> None:
        # What transformers draws alone is an embedding for more tokens.
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: HopeCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab_size] in float32 of input_ids [B, T] int64, and what is asked for.

        attention_mask: [B, T], or [B, P + T] behind the P positions that `cache` has read; 1 for a
        token, 0 for padding, which is not read. Logits of padding mean nothing.
        cache: from an earlier call, to continue its text; it is changed. (`past_key_values` until
        transformers 5.)
        labels: [B, T] int64, the loss's tokens: that at t is predicted from those before t. -100,
        padding, and the first token after padding do not count.
        use_cache: also return the cache; None: the config's `use_cache`, and not in training.
        logits_to_keep: compute only the last so many positions' logits (0: all), or those whose
        indices it holds.
        kwargs: `num_items_in_batch`, what the loss's sum is divided by instead of its own tokens.

        Raises HopeError, naming the argument.
        """
        if self.dtype in (torch.bfloat16, torch.float16):
            raise HopeError(
                f"dtype must be torch.float32, not {self.dtype}: weights are kept in it; "
                "torch.autocast makes the activations bfloat16"
            )
        options = _loss_options(kwargs)
        input_ids = _checked_ids(input_ids)
        if labels is not None and labels.shape != input_ids.shape:
            expected, got = tuple(input_ids.shape), tuple(labels.shape)
            raise HopeError(f"labels must have the shape of input_ids, {expected}, not {got}")
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise HopeError("logits_to_keep must be 0 with labels: the loss is that of all tokens")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is not None:
            _check_cache(cache, input_ids)
        elif use_cache:
            cache = HopeCache()
        real = _real(attention_mask, input_ids, 0 if cache is None else cache.get_seq_length())
        x, state = self._read(input_ids, real, None if cache is None else cache.state)
        if cache is not None:
            if real is not None and state is not None:
                state = state.compact()
            cache.advance(state, input_ids.shape[1])
        if isinstance(logits_to_keep, int):
            logits_to_keep = slice(-logits_to_keep, None)
        logits = self.model.head(x[:, logits_to_keep])
        loss = None
        if labels is not None:
            if real is not None:
                # Neither padding nor what is predicted from it.
                counted = real & F.pad(real, (1, 0), value=True)[:, :-1]
                labels = labels.masked_fill(~counted, _IGNORED)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], **options
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache if use_cache else None)

    def _read(
        self, tokens: Tensor, real: Tensor | None, state: ModelState | None
    ) -> tuple[Tensor, ModelState | None]:
        """What the head reads [B, T, dim], and the state after it; zeros where `real` is False."""
        call = None
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            call = self._gradient_checkpointing_func
        if real is None:
            return self.model.features(tokens, state, call=call)
        lengths = real.sum(1)
        rows = torch.zeros(*tokens.shape, self.config.dim, dtype=self.dtype, device=tokens.device)
        if int(lengths.sum()) == 0:
            return rows, state
        bounds = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        x, state = self.model.features(tokens[real][None], state, bounds, call=call)
        return rows.to(x.dtype).masked_scatter(real[..., None], x), state

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Reads the prompt; what transformers would pass over is refused."""
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("cache")
        if mask is not None and not bool(mask[:, -1].all()):
            raise HopeError(
                "attention_mask must end with 1 in every row to generate, because the next token "
                "follows the last one: pad on the left (padding_side='left')"
            )
        # A mask of all ones has been dropped, its length kept.
        covered = generation_config._mask_length if mask is None else mask.shape[1]
        past = cache.get_seq_length() if isinstance(cache, HopeCache) else 0
        if covered <= past:
            raise HopeError(
                f"input_ids must hold the whole text, the {past} tokens that cache has read and at "
                f"least one more, not {input_ids.shape[1]} tokens"
            )
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """Where transformers would make a cache of keys and values."""
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic"):
            raise HopeError(f"cache_implementation must be None, not {implementation!r}")
        if model_kwargs.get("cache") is None and generation_config.use_cache is not False:
            model_kwargs["cache"] = HopeCache()


def _loss_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The loss's keywords among those that a call of `forward` had; False and None ask nothing."""
    known = {"num_items_in_batch"}
    for name, value in kwargs.items():
        if name not in known and value is not None and value is not False:
            raise HopeError(f"{name} is not supported by HopeForCausalLM")
    return {name: kwargs[name] for name in known if name in kwargs}


def _checked_ids(input_ids: Tensor | None) -> Tensor:
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.dtype != torch.int64:
        got = input_ids
        if isinstance(input_ids, Tensor):
            got = f"{tuple(input_ids.shape)} {input_ids.dtype}"
        raise HopeError(f"input_ids must be [B, T] int64, not {got}")
    if input_ids.shape[1] == 0:
        raise HopeError("input_ids must hold at least one token a row, not 0")
    return input_ids


def _check_cache(cache: object, input_ids: Tensor) -> None:
    if not isinstance(cache, HopeCache):
        raise HopeError(f"cache must be a HopeCache, not a {type(cache).__name__}")
    if cache.batch_size not in (-1, len(input_ids)):
        raise HopeError(
            f"cache must hold a row for each of the {len(input_ids)} rows of input_ids, "
            f"not {cache.batch_size}"
        )


def _real(attention_mask: Tensor | None, input_ids: Tensor, past: int) -> Tensor | None:
    """Which of input_ids [B, T] are tokens, bool; None: all of them. Waits for the device."""
    if attention_mask is None:
        return None
    rows, tokens = input_ids.shape
    if tuple(attention_mask.shape) not in ((rows, tokens), (rows, past + tokens)):
        expected = f"[{rows}, {tokens}]" + (f" or [{rows}, {past + tokens}]" if past else "")
        raise HopeError(f"attention_mask must be {expected}, not {list(attention_mask.shape)}")
    new = attention_mask[:, -tokens:]
    real, padding = new == 1, new == 0
    valid, whole = torch.stack(((real | padding).all(), real.all())).tolist()
    if not valid:
        raise HopeError("attention_mask must be 1 for a token and 0 for padding, nothing else")
    return None if whole else real
