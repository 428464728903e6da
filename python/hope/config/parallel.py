"""How the processes of a run share its work."""

from dataclasses import dataclass

from hope.config.check import choose, require


@dataclass(frozen=True)
class ParallelConfig:
    """The processes that torchrun starts, as a grid: world = data * sequence * tensor.

    data: how the ranks that read different rows of the batch hold the weights: "ddp", all of them
    (DistributedDataParallel), or "fsdp", a part each (fully_shard). Their number is what the other
    two leave of the world.
    tensor: ranks that share a layer's heads and hidden units.
    sequence: ranks that read one part each of every sequence, and hand the memories on.
    """

    data: str = "ddp"
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        choose(self.data, "data", "ddp", "fsdp")
        for name in ("tensor", "sequence"):
            require(getattr(self, name) > 0, name, "at least 1", getattr(self, name))

    def data_ranks(self, world: int) -> int:
        """The ranks that read different rows, of a world of this many; HopeError if none fit."""
        others = self.tensor * self.sequence
        require(
            world % others == 0,
            "parallel",
            f"a grid of all {world} processes: parallel.tensor * parallel.sequence divides them",
            others,
        )
        data = world // others
        if self.tensor > 1 and data * self.sequence > 1:
            # DistributedDataParallel takes no DTensor.
            require(self.data == "fsdp", "parallel.data", "'fsdp' beside tensor ranks", self.data)
        return data
