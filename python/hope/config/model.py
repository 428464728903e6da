"""A language model."""

import itertools
from dataclasses import dataclass, field

from hope.config.check import choose, require
from hope.config.mixers import MixerConfig, TitansConfig


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
        require(rising, "chunk_sizes", "at least one number above 0, none falling", sizes)
        choose(self.variant, "variant", "sequential", "independent", "nested")
        if self.variant == "nested":
            whole = all(b % a == 0 for a, b in pairs)
            require(whole, "chunk_sizes", "multiples of each other where levels are nested", sizes)
        choose(self.activation, "activation", "gelu", "silu")
        require(
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
        require(self.vocab_size > 1, "vocab_size", "at least 2", self.vocab_size)
        require(self.dim > 0, "dim", "at least 1", self.dim)
        require(self.layers > 0, "layers", "at least 1", self.layers)
        require(self.mlp_ratio > 0, "mlp_ratio", "above 0", self.mlp_ratio)
        width = self.dim * self.mlp_ratio
        require(width < 2**31, "mlp_ratio", f"less than 2**31 / dim ({self.dim})", self.mlp_ratio)
        require(self.norm_eps > 0, "norm_eps", "above 0", self.norm_eps)
        choose(self.mlp, "mlp", "swiglu", "gelu")

    @property
    def mlp_dim(self) -> int:
        return sum(self.mlp_dims)

    @property
    def mlp_dims(self) -> tuple[int, ...]:
        """The width of each MLP of a block: one, or those of a CMS, as equal as can be."""
        count = 1 if self.cms is None else self.cms.mlps
        eights, more = divmod(max(count, round(self.dim * self.mlp_ratio / 8)), count)
        return tuple(8 * (eights + (i < more)) for i in range(count))
