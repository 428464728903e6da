"""Many processes train as one does: data, tensor and sequence parallelism (hope.parallel)."""

from __future__ import annotations

from collections.abc import Iterator

import parallel_checks as checks
import pytest
from hope.config import ParallelConfig
from worlds import World


@pytest.fixture(scope="module", params=[2, 4], ids=lambda size: f"world{size}")
def world(request, tmp_path_factory) -> Iterator[World]:
    processes = World(request.param, tmp_path_factory.mktemp("world"))
    yield processes
    processes.stop()


@pytest.mark.parametrize("data", ["ddp", "fsdp"])
@pytest.mark.parametrize("model", ["titans", "hope-cms", "mag"])
def test_data_ranks_have_the_gradients_of_one_process(world, model, data):
    world.run(checks.gradients, model, ParallelConfig(data=data))


@pytest.mark.parametrize(
    "model", ["titans", "titans-deep", "hope", "hope-cms", "attention", "attention-cms"]
)
def test_tensor_ranks_have_the_gradients_of_one_process(world, model):
    world.run(checks.gradients, model, ParallelConfig(tensor=world.size))


@pytest.mark.parametrize("model", checks.MODELS)
def test_sequence_ranks_have_the_gradients_of_one_process(world, model):
    world.run(checks.gradients, model, ParallelConfig(sequence=world.size))


@pytest.mark.parametrize("model", ["titans-deep", "hope-cms", "mag"])
def test_sequence_ranks_end_with_the_memories_of_one_process(world, model):
    world.run(checks.states, model, ParallelConfig(sequence=world.size))


GRIDS = [
    ParallelConfig(data="ddp", sequence=2),
    ParallelConfig(data="fsdp", sequence=2),
    ParallelConfig(data="fsdp", tensor=2),
    ParallelConfig(data="fsdp", tensor=2, sequence=2),
]


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize(("model", "periods"), [("titans", ()), ("hope-cms", (1, 2))])
def test_grids_train_as_one_process(world, model, periods, grid):
    """In a world of 4: two ranks in two dimensions; in one of 2: along one of them alone."""
    if world.size < grid.tensor * grid.sequence:
        grid = ParallelConfig(data=grid.data)
    world.run(checks.training, model, grid, periods)
