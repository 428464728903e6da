"""Many processes train as one does: data, tensor and sequence parallelism (hope.parallel)."""

from __future__ import annotations

from collections.abc import Iterator

import parallel_checks as checks
import pytest
from worlds import World

from hope.config import ParallelConfig


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
