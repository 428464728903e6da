"""Many processes train as one does: data, tensor and sequence parallelism (hope.parallel)."""

from __future__ import annotations

import re

import parallel_checks as checks
import pytest
from hope.config import ParallelConfig
from hope.errors import HopeError
from hope.parallel.tensor import check_tensor
from worlds import worlds


@worlds(2, 4)
@pytest.mark.parametrize("data", ["ddp", "fsdp"])
@pytest.mark.parametrize("model", ["titans", "hope-cms"])
def test_data_ranks_have_the_gradients_of_one_process(world, model, data):
    world.run(checks.gradients, model, ParallelConfig(data=data))


@worlds(2)
@pytest.mark.parametrize(
    "model", ["titans", "titans-deep", "hope", "hope-cms", "attention", "attention-cms"]
)
def test_two_tensor_ranks_have_the_gradients_of_one_process(world, model):
    world.run(checks.gradients, model, ParallelConfig(tensor=2))


@worlds(4)
@pytest.mark.parametrize("model", ["titans-deep", "hope-cms"])
def test_four_tensor_ranks_have_the_gradients_of_one_process(world, model):
    world.run(checks.gradients, model, ParallelConfig(tensor=4))


@worlds(2)
@pytest.mark.parametrize("model", checks.MODELS)
def test_two_sequence_ranks_have_the_gradients_of_one_process(world, model):
    world.run(checks.gradients, model, ParallelConfig(sequence=2))


@worlds(4)
@pytest.mark.parametrize("model", ["titans-deep", "hope-cms", "attention", "mac"])
def test_four_sequence_ranks_have_the_gradients_of_one_process(world, model):
    world.run(checks.gradients, model, ParallelConfig(sequence=4))


@worlds(4)
@pytest.mark.parametrize("model", ["titans-deep", "hope-cms", "mag"])
def test_sequence_ranks_end_with_the_memories_of_one_process(world, model):
    world.run(checks.states, model, ParallelConfig(sequence=4))


# Two ranks in each of two dimensions.
GRIDS = [
    ParallelConfig(data="ddp", sequence=2),
    ParallelConfig(data="fsdp", sequence=2),
    ParallelConfig(data="fsdp", tensor=2),
    ParallelConfig(data="fsdp", tensor=2, sequence=2),
]


@worlds(4)
@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize(("model", "periods"), [("titans", ()), ("hope-cms", (1, 2))])
def test_grids_train_as_one_process(world, model, periods, grid):
    world.run(checks.training, model, grid, periods)


@worlds(4)
@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_activations_may_be_computed_again(world, grid):
    world.run(checks.gradients, "hope-cms", grid, True)


@worlds(4)
@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[3]], ids=repr)
def test_activations_may_be_bfloat16(world, grid):
    world.run(checks.bfloat16, "hope-cms", grid)


@worlds(2, 4)
@pytest.mark.parametrize(
    ("model", "grid"),
    [
        ("hope-cms", ParallelConfig()),
        ("hope-cms", ParallelConfig(data="fsdp")),
        ("titans-deep", ParallelConfig(tensor=2, data="fsdp")),
        ("attention-cms", ParallelConfig(tensor=2, data="fsdp")),
    ],
    ids=repr,
)
def test_ranks_hold_what_the_arithmetic_says(world, model, grid):
    world.run(checks.held, model, grid)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "both"}, "data must be 'ddp' or 'fsdp', not 'both'"),
        ({"tensor": 0}, "tensor must be at least 1, not 0"),
        ({"sequence": -1}, "sequence must be at least 1, not -1"),
        ({"tensor": 3}, "divides them, not 3"),
        ({"tensor": 2}, "parallel.data must be 'fsdp' beside tensor ranks, not 'ddp'"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(settings, message):
    with pytest.raises(HopeError, match=re.escape(message)):
        ParallelConfig(**settings).data_ranks(4)


def test_layers_that_cannot_be_shared_are_refused():
    with pytest.raises(HopeError, match=r"must be 1 with model\.mixer\.kind 'mag'"):
        check_tensor(checks.MODELS["mag"], 2)
    with pytest.raises(HopeError, match=re.escape("a divisor of model.mixer.heads (4), not 3")):
        check_tensor(checks.MODELS["titans"], 3)
