"""What mixes tokens in a block: the memories, and attention."""

import typing
from dataclasses import dataclass
from typing import ClassVar

from hope.config.check import choose, require


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
        require(self.heads > 0, "heads", "at least 1", self.heads)
        require(self.head_dim > 0, "head_dim", "at least 1", self.head_dim)
        choose(self.memory, "memory", "linear", "deep")
        require(self.expansion > 0, "expansion", "at least 1", self.expansion)
        choose(self.activation, "activation", "gelu", "silu")
        choose(self.norm, "norm", "none", "layer")
        require(self.chunk_size > 0, "chunk_size", "at least 1", self.chunk_size)
        require(self.conv_width > 0, "conv_width", "at least 1", self.conv_width)
        require(
            0 < self.lr_max <= 2, "lr_max", "in (0, 2], where the inner loop is stable", self.lr_max
        )
        require(0 <= self.momentum_max <= 0.9, "momentum_max", "in [0, 0.9]", self.momentum_max)
        shortest, longest = self.half_lives
        require(shortest > 0, "half_life_min", "above 0", shortest)
        require(
            longest >= shortest, "half_life_max", f"at least half_life_min ({shortest:g})", longest
        )
        choose(self.objective, "objective", "l2", "dot")
        if self.memory == "deep" and self.norm == "none":
            # Each layer would grow by what the other holds, without an end.
            require(
                self.objective == "l2", "objective", "'l2' with a deep memory without a norm", "dot"
            )
        choose(self.read, "read", "after", "before", "chunk")

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
        require(
            self.head_dim % 4 == 0,
            "head_dim",
            "a multiple of 4 (rotary positions turn pairs in half of the dimensions)",
            self.head_dim,
        )
        require(self.persistent >= 0, "persistent", "at least 0", self.persistent)
        require(self.rope_base > 1, "rope_base", "above 1", self.rope_base)


@dataclass(frozen=True)
class MacConfig(_WithAttention):
    """Memory as a context (Titans, section 4.1): attention over segments, and what is remembered.

    segment: tokens per segment. heads * head_dim must be the model's dim.
    """

    kind: ClassVar[str] = "mac"

    segment: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.segment > 0, "segment", "at least 1", self.segment)


@dataclass(frozen=True)
class MagConfig(_WithAttention):
    """Memory as a gate (section 4.2): sliding-window attention, gated by a memory beside it.

    window: tokens that a token sees, itself included.
    """

    kind: ClassVar[str] = "mag"

    window: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.window > 0, "window", "at least 1", self.window)


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
            require(getattr(self, name) > 0, name, "at least 1", getattr(self, name))
        choose(self.activation, "activation", "gelu", "silu")
        require(
            0 < self.lr_max <= 0.2,
            "lr_max",
            "in (0, 0.2], where the inner loop is stable",
            self.lr_max,
        )
        # That of "dot" does not shrink when a value is learned: W1 and W2 would grow without end.
        require(self.objective == "l2", "objective", "'l2'", self.objective)
        choose(self.read, "read", "after", "before", "chunk")


@dataclass(frozen=True)
class AttentionConfig:
    """Causal softmax attention with rotary positions: what the memories are compared with."""

    kind: ClassVar[str] = "attention"

    heads: int = 4
    head_dim: int = 32
    conv_width: int = 1  # of the causal convolution on q, k and v; 1: none
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        require(self.heads > 0, "heads", "at least 1", self.heads)
        require(
            self.head_dim > 0 and self.head_dim % 2 == 0,
            "head_dim",
            "even and at least 2 (rotary positions turn pairs)",
            self.head_dim,
        )
        require(self.conv_width > 0, "conv_width", "at least 1", self.conv_width)
        require(self.rope_base > 1, "rope_base", "above 1", self.rope_base)


MixerConfig = TitansConfig | AttentionConfig | MacConfig | MagConfig | MalConfig | HopeConfig
MIXER_KINDS: dict[str, type[MixerConfig]] = {
    config.kind: config for config in typing.get_args(MixerConfig)
}
