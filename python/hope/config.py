"""Typed, validated, immutable descriptions of a model and its training, and their JSON form.

A mixer's config names its class: `MixerConfig` lists the config classes, whose `kind` the JSON form
carries, and `hope.layers.MIXERS` maps the config class to the module. A new memory adds one entry
to each.
"""

import dataclasses
import itertools
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from hope.errors import HopeError

T = TypeVar("T")


def _require(condition: bool, name: str, expected: str, value: object) -> None:
    if not condition:
        raise HopeError(f"{name} must be {expected}, not {value!r}")


def _choose(value: object, name: str, *choices: str) -> None:
    *others, last = map(repr, choices)
    _require(value in choices, name, f"{', '.join(others)} or {last}", value)


@dataclass(frozen=True)
class TitansConfig:
    """The Titans memory as a token mixer: one memory per head, rewritten while it reads.

    memory: "linear", a matrix; "deep", `M(x) = x + act(x W1) W2`, an MLP that is `expansion` times
    as wide inside, act "gelu" (the tanh form) or "silu". norm: "layer" puts a LayerNorm on what the
    memory adds to x, whose weight and bias the inner loop leaves alone (then a linear memory is
    `x + LN(x W)`, that of TTT).

    The inner learning rate of a token is `lr_max * (1 - momentum) / chunk_size * sigmoid(.)`: a
    chunk's gradients are all taken at its start and add up, so the inner loop is stable only while
    `chunk_size * lr / (1 - momentum)` stays below 2 for keys of length 1. (A deep memory's rate is
    scaled further: see hope.layers.memory.)
    """

    kind: ClassVar[str] = "titans"

    heads: int = 4
    head_dim: int = 32
    memory: str = "linear"
    expansion: int = 4  # of a deep memory
    activation: str = "gelu"  # of a deep memory
    norm: str = "none"
    chunk_size: int = 32
    conv_width: int = 4  # of the causal convolution on q, k and v; 1: a factor alone
    lr_max: float = 1.5
    momentum_max: float = 0.9  # 0: no momentum
    # The decay gates start with half-lives spread over the heads between these numbers of tokens;
    # None: 32 and 2048, or 4096 and 65536 for a deep memory, which near zero weights hardly learns.
    half_life_min: float | None = None
    half_life_max: float | None = None
    objective: str = "l2"
    read: str = "after"

    def __post_init__(self) -> None:
        _require(self.heads > 0, "heads", "at least 1", self.heads)
        _require(self.head_dim > 0, "head_dim", "at least 1", self.head_dim)
        _choose(self.memory, "memory", "linear", "deep")
        _require(self.expansion > 0, "expansion", "at least 1", self.expansion)
        _choose(self.activation, "activation", "gelu", "silu")
        _choose(self.norm, "norm", "none", "layer")
        _require(self.chunk_size > 0, "chunk_size", "at least 1", self.chunk_size)
        _require(self.conv_width > 0, "conv_width", "at least 1", self.conv_width)
        _require(
            0 < self.lr_max <= 2, "lr_max", "in (0, 2], where the inner loop is stable", self.lr_max
        )
        _require(0 <= self.momentum_max <= 0.9, "momentum_max", "in [0, 0.9]", self.momentum_max)
        shortest, longest = self.half_lives
        _require(shortest > 0, "half_life_min", "above 0", shortest)
        _require(
            longest >= shortest, "half_life_max", f"at least half_life_min ({shortest:g})", longest
        )
        _choose(self.objective, "objective", "l2", "dot")
        if self.memory == "deep" and self.norm == "none":
            # Each layer would grow by what the other holds, without an end.
            _require(
                self.objective == "l2", "objective", "'l2' with a deep memory without a norm", "dot"
            )
        _choose(self.read, "read", "after", "before", "chunk")

    @property
    def half_lives(self) -> tuple[float, float]:
        """The shortest and the longest that the decay gates start with."""
        shortest, longest = (4096.0, 65536.0) if self.memory == "deep" else (32.0, 2048.0)
        if self.half_life_min is not None:
            shortest = self.half_life_min
        if self.half_life_max is not None:
            longest = self.half_life_max
        return shortest, longest


@dataclass(frozen=True)
class _WithAttention(TitansConfig):
    """A Titans memory and attention over few tokens, in one mixer with the same heads.

    persistent: learned keys and values per head that every token sees.
    """

    persistent: int = 4
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            self.head_dim % 4 == 0,
            "head_dim",
            "a multiple of 4 (rotary positions turn pairs in half of the dimensions)",
            self.head_dim,
        )
        _require(self.persistent >= 0, "persistent", "at least 0", self.persistent)
        _require(self.rope_base > 1, "rope_base", "above 1", self.rope_base)


@dataclass(frozen=True)
class MacConfig(_WithAttention):
    """Memory as a context (Titans, section 4.1): attention over segments, and what is remembered.

    segment: tokens per segment. heads * head_dim must be the model's dim.
    """

    kind: ClassVar[str] = "mac"

    segment: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.segment > 0, "segment", "at least 1", self.segment)


@dataclass(frozen=True)
class MagConfig(_WithAttention):
    """Memory as a gate (section 4.2): sliding-window attention, gated by a memory beside it.

    window: tokens that a token sees, itself included.
    """

    kind: ClassVar[str] = "mag"

    window: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.window > 0, "window", "at least 1", self.window)


@dataclass(frozen=True)
class MalConfig(MagConfig):
    """Memory as a layer (section 4.3): sliding-window attention over what a memory answers."""

    kind: ClassVar[str] = "mal"


@dataclass(frozen=True)
class HopeConfig:
    """HOPE's self-modifying memory: five deep memories per head, rewritten while they read.

    They are `M(x) = x + act(x W1) W2`, MLPs that are `expansion` times as wide inside, act "gelu"
    (the tanh form) or "silu". Keys, values, inner learning rates and retentions are what four of
    them answer; all five learn from these.

    A token's inner learning rate is `lr_max / chunk_size * sigmoid(.)`. lr_max is lower than a
    Titans memory's: a key that repeats wears W1 away, which makes W2 grow, and with it the steps on
    W1 (docs/models.md).
    """

    kind: ClassVar[str] = "hope"

    heads: int = 4
    head_dim: int = 32
    expansion: int = 1
    activation: str = "gelu"
    chunk_size: int = 16
    conv_width: int = 4  # of the causal convolution on queries and inputs; 1: a factor alone
    lr_max: float = 0.2
    objective: str = "l2"
    read: str = "before"

    def __post_init__(self) -> None:
        for name in ("heads", "head_dim", "expansion", "chunk_size", "conv_width"):
            _require(getattr(self, name) > 0, name, "at least 1", getattr(self, name))
        _choose(self.activation, "activation", "gelu", "silu")
        _require(
            0 < self.lr_max <= 0.2,
            "lr_max",
            "in (0, 0.2], where the inner loop is stable",
            self.lr_max,
        )
        # That of "dot" does not shrink when a value is learned: W1 and W2 would grow without end.
        _require(self.objective == "l2", "objective", "'l2'", self.objective)
        _choose(self.read, "read", "after", "before", "chunk")


@dataclass(frozen=True)
class AttentionConfig:
    """Causal softmax attention with rotary positions: what the memories are compared with."""

    kind: ClassVar[str] = "attention"

    heads: int = 4
    head_dim: int = 32
    conv_width: int = 1  # of the causal convolution on q, k and v; 1: none
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        _require(self.heads > 0, "heads", "at least 1", self.heads)
        _require(
            self.head_dim > 0 and self.head_dim % 2 == 0,
            "head_dim",
            "even and at least 2 (rotary positions turn pairs)",
            self.head_dim,
        )
        _require(self.conv_width > 0, "conv_width", "at least 1", self.conv_width)
        _require(self.rope_base > 1, "rope_base", "above 1", self.rope_base)


MixerConfig = TitansConfig | AttentionConfig | MacConfig | MagConfig | MalConfig | HopeConfig
MIXER_KINDS: dict[str, type[MixerConfig]] = {
    config.kind: config for config in typing.get_args(MixerConfig)
}


@dataclass(frozen=True)
class CmsConfig:
    """A continuum memory system in the MLP's place: MLPs that read and are rewritten at paces.

    chunk_sizes: tokens between two updates of each level, from the fastest to the slowest.
    updates: whether a text rewrites them; False: MLPs that only read.
    variant: "sequential", each level reads what the one before it gives; "independent", all read
    the block's input and their answers are added; "nested", one MLP, in which a level starts anew
    at every update of the next slower one, from that one's weights, and the fastest answers.
    activation: "gelu" (the tanh form) or "silu".

    A token's inner learning rate is `lr_max / chunk_size * sigmoid(.)`, of the mean over the
    channels of the squared error (hope.layers.cms).
    """

    chunk_sizes: tuple[int, ...] = (512, 2048, 8192, 32768)
    updates: bool = True
    variant: str = "sequential"
    activation: str = "gelu"
    lr_max: float = 1.0

    def __post_init__(self) -> None:
        sizes = self.chunk_sizes
        pairs = list(itertools.pairwise(sizes))
        rising = len(sizes) > 0 and min(sizes) > 0 and all(a <= b for a, b in pairs)
        _require(rising, "chunk_sizes", "at least one number above 0, none falling", sizes)
        _choose(self.variant, "variant", "sequential", "independent", "nested")
        if self.variant == "nested":
            whole = all(b % a == 0 for a, b in pairs)
            _require(whole, "chunk_sizes", "multiples of each other where levels are nested", sizes)
        _choose(self.activation, "activation", "gelu", "silu")
        _require(
            0 < self.lr_max <= 1, "lr_max", "in (0, 1], where the inner loop is stable", self.lr_max
        )

    @property
    def mlps(self) -> int:
        """How many MLPs the levels are."""
        return 1 if self.variant == "nested" else len(self.chunk_sizes)


@dataclass(frozen=True)
class ModelConfig:
    """A language model: `layers` blocks of a mixer and an MLP, with a tied embedding.

    mlp: "swiglu", or "gelu": two matrices and the tanh form of gelu between them.
    cms: a continuum memory system in the MLP's place; None: none.
    """

    mixer: MixerConfig = field(default_factory=TitansConfig)
    vocab_size: int = 264  # 256 bytes, the document separator, and padding to a multiple of 8
    dim: int = 128
    layers: int = 4
    # The MLP's width, or that of all MLPs of a CMS together, is dim * mlp_ratio, rounded to a
    # multiple of 8.
    mlp_ratio: float = 8 / 3
    norm_eps: float = 1e-6
    mlp: str = "swiglu"
    cms: CmsConfig | None = None

    def __post_init__(self) -> None:
        _require(self.vocab_size > 1, "vocab_size", "at least 2", self.vocab_size)
        _require(self.dim > 0, "dim", "at least 1", self.dim)
        _require(self.layers > 0, "layers", "at least 1", self.layers)
        _require(self.mlp_ratio > 0, "mlp_ratio", "above 0", self.mlp_ratio)
        _require(self.norm_eps > 0, "norm_eps", "above 0", self.norm_eps)
        _choose(self.mlp, "mlp", "swiglu", "gelu")

    @property
    def mlp_dim(self) -> int:
        return sum(self.mlp_dims)

    @property
    def mlp_dims(self) -> tuple[int, ...]:
        """The width of each MLP of a block: one, or those of a CMS, as equal as can be."""
        count = 1 if self.cms is None else self.cms.mlps
        eights, more = divmod(max(count, round(self.dim * self.mlp_ratio / 8)), count)
        return tuple(8 * (eights + (i < more)) for i in range(count))


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. Sizes are in tokens; `*_every` are in optimizer steps."""

    tokens: int = 3_000_000
    batch: int = 16
    sequence: int = 256
    lr: float = 4e-3
    lr_final: float = 0.0  # the learning rate at the end, as a fraction of lr
    schedule: str = "cosine"
    warmup: float = 0.05  # fraction of the steps in which lr rises from 0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0
    validate_every: int = 200
    validation_tokens: int = 131_072
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    dtype: str = "float32"  # of the activations (autocast); weights and gates are float32
    compile: bool = False  # through torch.compile
    # Optimizer steps between two moves of each MLP of a CMS (hope.optim.MultiFrequency); empty: all
    # weights move in every step.
    level_periods: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            *("tokens", "batch", "sequence", "validate_every", "validation_tokens"),
            *("checkpoint_every", "keep_checkpoints"),
        ):
            _require(getattr(self, name) > 0, name, "at least 1", getattr(self, name))
        for name in ("lr", "eps", "clip"):
            _require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        for name in ("beta1", "beta2", "warmup"):
            _require(0 <= getattr(self, name) < 1, name, "in [0, 1)", getattr(self, name))
        _require(0 <= self.lr_final <= 1, "lr_final", "in [0, 1]", self.lr_final)
        _require(self.weight_decay >= 0, "weight_decay", "at least 0", self.weight_decay)
        _choose(self.schedule, "schedule", "cosine", "linear")
        _choose(self.dtype, "dtype", "float32", "bfloat16")
        periods = self.level_periods
        _require(min(periods, default=1) > 0, "level_periods", "numbers above 0", periods)

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.sequence

    @property
    def steps(self) -> int:
        """Optimizer steps that the token budget pays for (at least one)."""
        return max(1, self.tokens // self.tokens_per_step)


@dataclass(frozen=True)
class RunConfig:
    """Everything a training run depends on; written into every checkpoint.

    data: files, directories or glob patterns; empty: the source of Python's standard library.
    """

    preset: str = "custom"
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        periods, cms = self.train.level_periods, self.model.cms
        mlps = 0 if cms is None else cms.mlps
        _require(
            len(periods) in (0, mlps),
            "train.level_periods",
            f"empty or one number for each of the {mlps} MLPs of model.cms",
            periods,
        )


def to_dict(config: Any) -> dict[str, Any]:
    """The JSON form of a config: nested dicts; a mixer also carries its `kind`."""
    result: dict[str, Any] = {"kind": config.kind} if hasattr(config, "kind") else {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        result[item.name] = list(value) if isinstance(value, tuple) else value
    return result


def from_dict(cls: type[T], data: Mapping[str, Any], path: str = "") -> T:
    """The inverse of `to_dict`: missing fields take defaults, wrong ones raise HopeError."""
    if not isinstance(data, Mapping):
        raise HopeError(f"{path or cls.__name__} must be an object with fields, not {data!r}")
    hints = typing.get_type_hints(cls)
    names = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values = {}
    for name, value in data.items():
        here = f"{path}.{name}" if path else name
        if name not in names:
            raise HopeError(f"unknown field {here}; there are: {', '.join(names)}")
        values[name] = _parse(hints[name], value, here)
    try:
        return cls(**values)
    except HopeError as error:
        raise HopeError(f"{path}.{error}" if path else str(error)) from None


def _parse(hint: Any, value: Any, path: str) -> Any:
    if hint == MixerConfig:
        return _parse_mixer(value, path)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, path)  # type: ignore[type-var]
    if typing.get_origin(hint) is tuple:
        kind, plural = (int, "integers") if int in typing.get_args(hint) else (str, "strings")
        if isinstance(value, (list, tuple)) and all(type(item) is kind for item in value):
            return tuple(value)
        raise HopeError(f"{path} must be a list of {plural}, not {value!r}")
    if type(None) in typing.get_args(hint):  # "T | None"
        if value is None:
            return None
        (hint,) = (item for item in typing.get_args(hint) if item is not type(None))
        return _parse(hint, value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 3e6 is a natural way to write a token budget
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise HopeError(f"{path} must be of type {hint.__name__}, not {value!r}")


def _parse_mixer(value: Any, path: str) -> MixerConfig:
    if isinstance(value, str):  # the kind alone: its defaults
        value = {"kind": value}
    if not isinstance(value, Mapping) or value.get("kind") not in MIXER_KINDS:
        kind = value.get("kind") if isinstance(value, Mapping) else value
        raise HopeError(f"{path}.kind must be one of {', '.join(MIXER_KINDS)}, not {kind!r}")
    fields = {name: item for name, item in value.items() if name != "kind"}
    return from_dict(MIXER_KINDS[value["kind"]], fields, path)


def override(config: T, assignments: typing.Iterable[str]) -> T:
    """A copy of `config` with assignments such as `"model.dim=192"` made, in order.

    The value is JSON, or else a string. `model.mixer=attention` takes that mixer with its defaults.
    """
    data = to_dict(config)
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        *parents, name = path.strip().split(".")
        if not separator or not name:
            raise HopeError(f"an override looks like model.dim=192, not {assignment!r}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text.strip()
        target = data
        for depth, parent in enumerate(parents):
            if not isinstance(target.get(parent), dict):
                where = ".".join(parents[: depth + 1])
                raise HopeError(f"{assignment!r}: there is no group of settings {where!r}")
            target = target[parent]
        if name not in target:
            known = ", ".join(target)
            raise HopeError(
                f"{assignment!r}: there is no setting {path.strip()!r}; there are: {known}"
            )
        target[name] = value
        # Parsed after every assignment: a later one may set a field of a mixer that this one chose.
        config = from_dict(type(config), data)
        data = to_dict(config)
    return config
