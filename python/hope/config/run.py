"""How a model is trained, and on what."""

from dataclasses import dataclass, field
from typing import ClassVar

from hope.config.check import choose, require
from hope.config.model import ModelConfig
from hope.config.parallel import ParallelConfig


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. Sizes are in tokens; `*_every` are in optimizer steps."""

    tokens: int = 3_000_000
    batch: int = 16  # sequences in a step
    accumulate: int = 1  # parts that a batch is computed in, one after the other, to save memory
    sequence: int = 256
    lr: float = 4e-3
    lr_final: float = 0.0  # the learning rate at the end, as a fraction of lr
    schedule: str = "cosine"
    warmup: float = 0.05  # fraction of the steps in which lr rises from 0
    decay: float = 0.2  # of schedule wsd: fraction of the steps in which lr falls
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
    checkpoint_activations: bool = False  # of blocks: computed again in the backward pass
    tensorboard: bool = False  # metrics also as TensorBoard's events
    wandb: str | None = None  # metrics also to this project of wandb
    # Optimizer steps between two moves of each MLP of a CMS (hope.optim.MultiFrequency); empty: all
    # weights move in every step.
    level_periods: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            *("tokens", "batch", "accumulate", "sequence", "validate_every"),
            *("validation_tokens", "checkpoint_every", "keep_checkpoints"),
        ):
            require(getattr(self, name) > 0, name, "at least 1", getattr(self, name))
        for name in ("lr", "eps", "clip"):
            require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        for name in ("beta1", "beta2", "warmup"):
            require(0 <= getattr(self, name) < 1, name, "in [0, 1)", getattr(self, name))
        require(0 <= self.seed < 2**63, "seed", "in [0, 2**63)", self.seed)
        require(0 <= self.lr_final <= 1, "lr_final", "in [0, 1]", self.lr_final)
        require(self.weight_decay >= 0, "weight_decay", "at least 0", self.weight_decay)
        divides = self.batch % self.accumulate == 0
        require(divides, "accumulate", f"a divisor of batch ({self.batch})", self.accumulate)
        choose(self.schedule, "schedule", "cosine", "linear", "wsd")
        if self.schedule == "wsd":
            most = 1 - self.warmup
            require(0 < self.decay <= most, "decay", f"in (0, {most:g}], after warmup", self.decay)
        require(self.wandb != "", "wandb", "the name of a project or null", self.wandb)
        choose(self.dtype, "dtype", "float32", "bfloat16")
        periods = self.level_periods
        require(min(periods, default=1) > 0, "level_periods", "numbers above 0", periods)

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.sequence

    @property
    def steps(self) -> int:
        """Optimizer steps that the token budget pays for (at least one)."""
        return max(1, self.tokens // self.tokens_per_step)


@dataclass(frozen=True)
class DataConfig:
    """What a model is trained on, and how it is cut. A list in the JSON form is `paths`.

    paths: files, directories, glob patterns, shards, data sets (docs/data.md); empty: the source of
    Python's standard library.
    tokenizer: a tokenizer.json; None: bytes, or what shards were made with.
    field: where JSON lines, Parquet files and data sets hold the text.
    packed: no memory passes from one document to the next; False: windows of the text, in which
    separators alone part the documents.
    """

    short: ClassVar[str] = "paths"  # the field that is meant where no field is named

    paths: tuple[str, ...] = ()
    tokenizer: str | None = None
    field: str = "text"
    packed: bool = False

    def __post_init__(self) -> None:
        require(self.tokenizer != "", "tokenizer", "the path of a tokenizer.json or null", "")
        require(self.field != "", "field", "the name of a field", "")


@dataclass(frozen=True)
class RunConfig:
    """Everything a training run depends on; written into every checkpoint."""

    preset: str = "custom"
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        require(
            not (self.data.packed and self.parallel.sequence > 1),
            "parallel.sequence",
            "1 with data.packed, whose rows hold many short texts",
            self.parallel.sequence,
        )
        periods, cms = self.train.level_periods, self.model.cms
        mlps = 0 if cms is None else cms.mlps
        require(
            len(periods) in (0, mlps),
            "train.level_periods",
            f"empty or one number for each of the {mlps} MLPs of model.cms",
            periods,
        )
