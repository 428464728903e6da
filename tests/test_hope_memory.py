"""What training needs in memory, as `hope memory` computes it (hope.parallel.memory)."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hope.cli import main
from hope.config import ParallelConfig
from hope.model import parameter_count
from hope.parallel.memory import activations, kept_bytes, training_memory
from hope.presets import PRESETS, preset

SMALL = ["tiny", "tiny-deep", "tiny-mag", "hope-tiny-cms", "hope-attention-tiny"]


def small(name: str, layers: int = 1):
    return replace(preset(name).model, layers=layers, dim=128)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SMALL)
def test_fake_tensors_are_kept_like_true_ones(name, dtype):
    """To the byte, for both kinds of what is kept."""
    expected = kept_bytes(small(name), 2, 48, dtype, fake=False)
    assert kept_bytes(small(name), 2, 48, dtype, fake=True) == expected
    assert expected["memories"] > 0


@pytest.mark.parametrize("name", ["tiny", "hope-tiny-cms"])
def test_one_block_tells_of_all(name):
    true = kept_bytes(small(name, layers=3), 2, 48, "float32", fake=False)
    computed = activations(small(name, layers=3), 2, 48, "float32")
    assert computed.total == pytest.approx(sum(true.values()), rel=0.001)
    assert computed.memories == true["memories"]


@pytest.mark.parametrize("name", ["tiny-mac", "hope-tiny-cms", "1.3b"])
def test_a_weight_costs_sixteen_bytes(name):
    memory = training_memory(preset(name), ParallelConfig())
    assert memory.held == memory.parameters == parameter_count(preset(name).model)
    assert memory.weights + memory.gradients + memory.optimizer == 16 * memory.parameters


def test_ranks_share_what_there_is():
    # In float32: in bfloat16 autograd keeps rounded weights too, whatever the batch.
    run = replace(preset("125m"), train=replace(preset("125m").train, batch=8, dtype="float32"))
    one = training_memory(run, ParallelConfig())
    ddp = training_memory(run, ParallelConfig(), world=4)
    assert (ddp.held, ddp.rows, ddp.gathered) == (one.held, 2, 0)
    assert ddp.activations.layers == pytest.approx(one.activations.layers / 4, rel=0.01)
    fsdp = training_memory(run, ParallelConfig(data="fsdp"), world=4)
    assert fsdp.held == pytest.approx(one.held / 4, rel=0.001)
    assert fsdp.activations == ddp.activations
    tensor = training_memory(run, ParallelConfig(tensor=4), world=4)
    assert one.held / 4 < tensor.held < one.held / 3.9  # embedding and norms are whole
    assert tensor.rows == one.rows
    sequence = training_memory(run, ParallelConfig(sequence=4), world=4)
    assert (sequence.held, sequence.tokens) == (one.held, one.tokens // 4)


def test_weights_that_move_seldom_are_collected_for():
    run = preset("hope-tiny-cms")
    slow = replace(run, train=replace(run.train, level_periods=(1, 2, 4, 8)))
    more = (
        training_memory(slow, ParallelConfig()).optimizer
        - training_memory(run, ParallelConfig()).optimizer
    )
    dim, layers = run.model.dim, run.model.layers
    assert more == 4 * layers * sum(2 * dim * width + dim for width in run.model.mlp_dims[1:])


# All are of one size up to rounding; of the large ones, which take seconds, one of each kind.
@pytest.mark.parametrize("name", [n for n in PRESETS if "tiny" in n] + ["340m", "hope-340m"])
def test_the_table_of_the_page_is_what_is_computed(name, root):
    page = (root / "docs/scale.md").read_text()
    (row,) = re.findall(rf"^\| `{name}` \|(.*)\|$", page, re.MULTILINE)
    parameters, state, kept, memories, together, again, sharded = row.split("|")
    run = preset(name)
    plain = training_memory(run, ParallelConfig(), rows=1)
    checkpointed = replace(run, train=replace(run.train, checkpoint_activations=True))
    assert parameters.strip() == f"{plain.parameters / 1e6:.2f} M"
    for cell, expected in (
        (state, 16 * plain.parameters),
        (kept, plain.activations.total),
        (memories, plain.activations.memories),
        (together, plain.total),
        (again, training_memory(checkpointed, ParallelConfig(), rows=1).total),
        (sharded, training_memory(run, ParallelConfig("fsdp"), world=8, rows=1).total),
    ):
        assert float(cell) == pytest.approx(
            expected / 2**30, abs=0.0051 if expected > 1e8 else 6e-4
        )


def test_activations_computed_again_are_one_blocks_and_all_inputs():
    config = small("tiny", layers=3)
    one = activations(replace(config, layers=1), 2, 48, "float32")
    again = activations(config, 2, 48, "float32", again=True)
    assert again.layers == one.layers + 3 * 4 * 2 * 48 * config.dim
    assert again.memories == one.memories


def test_memory_command(capsys):
    assert main(["memory", "tiny", "1.3b", "--world", "8", "--set", "parallel.data=fsdp"]) == 0
    header, tiny, large = capsys.readouterr().out.splitlines()
    assert "GiB on each of 8" in header
    assert "0.92 M" in tiny
    assert "1319.29 M" in large
    assert "32 x 2048" in large


def test_memory_command_refuses(capsys):
    assert main(["memory", "tiny-mag", "--world", "2", "--set", "parallel.tensor=2"]) == 2
    assert "parallel.tensor must be 1 with model.mixer.kind 'mag'" in capsys.readouterr().err
    assert main(["memory", "huge"]) == 2
    assert "unknown preset 'huge'" in capsys.readouterr().err
