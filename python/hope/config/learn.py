"""How a trained model goes on learning."""

from dataclasses import dataclass

from hope.config.check import choose, require

METHODS = ("cms", "finetune", "mlp")


@dataclass(frozen=True)
class LearnConfig:
    """How a trained model learns from a text that it reads once, in segments.

    method: "cms", the MLPs of a continuum memory system, each at its own pace; "finetune", all
    weights, in every segment; "mlp", the same for the MLPs alone.
    segment: tokens that are read with the same weights; their loss is what is learned from.
    chunks: tokens between two moves of each MLP of a CMS, whole segments; () for other methods.
    context: tokens after which the carried state starts anew, whole segments; 0: never.
    rule: "adamw" (without weight decay) or "sgd". lr: its rate, one for all or one for each MLP of
    a CMS. clip: largest norm of a segment's gradient.
    """

    method: str = "cms"
    segment: int = 64
    chunks: tuple[int, ...] = ()
    context: int = 0
    rule: str = "adamw"
    lr: tuple[float, ...] = (1e-4,)
    clip: float = 1.0
    checkpoint_every: int = 262_144  # tokens

    def __post_init__(self) -> None:
        choose(self.method, "method", *METHODS)
        choose(self.rule, "rule", "adamw", "sgd")
        for name in ("segment", "checkpoint_every"):
            require(getattr(self, name) > 0, name, "at least 1", getattr(self, name))
        whole = f"whole segments of {self.segment} tokens"
        require(self.context >= 0, "context", "at least 0", self.context)
        require(self.context % self.segment == 0, "context", whole, self.context)
        if self.method != "cms":
            require(not self.chunks, "chunks", f"empty with the method {self.method}", self.chunks)
        fits = all(chunk > 0 and chunk % self.segment == 0 for chunk in self.chunks)
        require(fits, "chunks", whole, self.chunks)
        rates = (1, max(1, len(self.chunks)))
        require(len(self.lr) in rates, "lr", "one number, or one for each of chunks", self.lr)
        require(min(self.lr, default=0) > 0, "lr", "above 0", self.lr)
        require(self.clip > 0, "clip", "above 0", self.clip)

    @property
    def rates(self) -> tuple[float, ...]:
        """The rate of each MLP of a CMS; of other methods, the rate."""
        return self.lr * max(1, len(self.chunks)) if len(self.lr) == 1 else self.lr

    @property
    def periods(self) -> tuple[int, ...]:
        """Segments between two moves of each MLP of a CMS."""
        return tuple(chunk // self.segment for chunk in self.chunks)
