"""Training on many processes is training on one: the trainer and `hope train` (docs/scale.md)."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import parallel_runs
import pytest
import runs
import torch
from hope import CmsConfig, DataConfig, HopeConfig, HopeError, load_model
from hope.checkpoint import find_checkpoint
from hope.config import ParallelConfig
from worlds import worlds

ROOT = Path(__file__).resolve().parent.parent
_CMS = replace(
    runs.MODEL, mixer=HopeConfig(heads=2, head_dim=8, chunk_size=8), cms=CmsConfig((5, 16))
)


each_way = pytest.mark.parametrize(
    "grid",
    [
        ParallelConfig(),
        ParallelConfig("fsdp"),
        ParallelConfig(tensor=2),
        ParallelConfig(sequence=2),
    ],
    ids=["ddp", "fsdp", "tensor", "sequence"],
)


def on(grid: ParallelConfig, model=runs.MODEL, **changes):
    train = replace(runs.TRAIN, **changes)
    return replace(runs.CONFIG, model=model, parallel=grid, train=train)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(runs.TEXT)
    return str(path)


def assert_close_runs(out: Path, expected: Path) -> None:
    """The same records and weights, up to rounding."""
    lines, other = (runs.without_times(runs.records(path)) for path in (out, expected))
    assert len(lines) == len(other)
    for line, wanted in zip(lines, other, strict=True):
        assert line == pytest.approx(wanted, rel=1e-3)
    trained = load_model(expected).state_dict()
    for name, weight in load_model(out).state_dict().items():
        # AdamW divides small gradients by their size, and so their rounding, too.
        torch.testing.assert_close(weight, trained[name], rtol=0, atol=2e-3)


def assert_same_runs(out: Path, expected: Path) -> None:
    lines, other = (runs.without_times(runs.records(path)) for path in (out, expected))
    assert lines == other
    trained = load_model(expected).state_dict()
    for name, weight in load_model(out).state_dict().items():
        assert torch.equal(weight, trained[name]), name
    assert (out / "sample.txt").read_text() == (expected / "sample.txt").read_text()


@worlds(4)
@pytest.mark.parametrize(
    ("grid", "model", "changes"),
    [
        (ParallelConfig(), runs.MODEL, {"accumulate": 1}),
        (ParallelConfig("fsdp", sequence=2), _CMS, {"accumulate": 2, "level_periods": (1, 2)}),
        (ParallelConfig("fsdp", tensor=2, sequence=2), _CMS, {"checkpoint_activations": True}),
    ],
    ids=["ddp", "fsdp-sequence", "fsdp-sequence-tensor"],
)
def test_a_run_on_a_grid_is_that_of_one_process(world, tmp_path, text, grid, model, changes):
    # 160 tokens are five windows, which four ranks do not share evenly.
    changes |= {"tokens": 4 * 4 * 32, "validation_tokens": 160}
    one, many = on(ParallelConfig(), model, **changes), on(grid, model, **changes)
    parallel_runs.train(one, text, tmp_path / "one")
    assert world.run(parallel_runs.train, many, text, tmp_path / "many") == [4] * 4
    assert_close_runs(tmp_path / "many", tmp_path / "one")
    assert (tmp_path / "many" / "sample.txt").exists()


@worlds(4)
def test_packed_documents_are_shared_by_rows(world, tmp_path, text):
    """The stream's end, which has no target, makes one rank's mean that of fewer targets."""
    data = DataConfig(packed=True)
    changes = {"tokens": 4 * 4 * 32, "validation_tokens": 160, "accumulate": 1}
    one = replace(on(ParallelConfig(), **changes), data=data)
    parallel_runs.train(one, text, tmp_path / "one")
    many = replace(on(ParallelConfig("fsdp"), **changes), data=data)
    world.run(parallel_runs.train, many, text, tmp_path / "many")
    assert_close_runs(tmp_path / "many", tmp_path / "one")


@worlds(2)
@each_way
def test_a_signal_to_one_stops_all_and_the_rest_is_bitwise_the_same(world, tmp_path, text, grid):
    config, steps = on(grid, tokens=6 * 4 * 32), 6
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    world.run(parallel_runs.train, config, text, whole)
    stopped = world.run(parallel_runs.train_until_one_is_told_to_stop, config, text, parts, 3)
    assert stopped == ["SIGTERM"] * 2
    assert world.run(parallel_runs.train, config, text, parts, True) == [steps] * 2
    assert_same_runs(parts, whole)


@worlds(2)
def test_the_first_rank_alone_shows_a_bar(world, tmp_path, text):
    config = on(ParallelConfig(), tokens=2 * 4 * 32)
    first, other = world.run(parallel_runs.stderr, config, text, tmp_path / "run")
    assert re.search(r"100%.* 256/256 \[", first)
    assert other == ""


@worlds(2)
def test_another_number_of_ranks_goes_on(world, tmp_path, text):
    config = on(ParallelConfig("fsdp"), tokens=6 * 4 * 32)
    parallel_runs.train(config, text, tmp_path / "one")
    out = tmp_path / "parts"
    world.run(parallel_runs.train_until_one_is_told_to_stop, config, text, out, 3)
    assert parallel_runs.train(config, text, out, resume=True) == 6
    assert_close_runs(out, tmp_path / "one")


@worlds(2)
@each_way
@pytest.mark.parametrize(
    ("value", "where"),
    [(math.nan, "the parameter blocks.0.mixer.out.weight"), (3e38, "the output of ")],
)
def test_all_ranks_say_where_a_run_diverged(world, tmp_path, text, grid, value, where):
    messages = world.run(parallel_runs.diverge, on(grid), text, tmp_path / "run", value)
    assert len(set(messages)) == 1
    assert "training diverged at step 2" in messages[0]
    assert where in messages[0]


@worlds(2)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (on(ParallelConfig(), batch=3), "train.batch / train.accumulate must be a multiple of the"),
        (on(ParallelConfig(sequence=2), sequence=31), "train.sequence must be a multiple of the"),
        (on(ParallelConfig("fsdp"), compile=True), "train.compile must be false, but for ranks"),
        (on(ParallelConfig(tensor=4)), "a grid of all 2 processes"),
    ],
    ids=["rows", "tokens", "compile", "world"],
)
def test_settings_that_do_not_fit_the_ranks_are_refused(world, tmp_path, text, config, message):
    for said in world.run(parallel_runs.refuse, config, text, tmp_path / "run"):
        assert message in said


def test_packed_documents_are_not_shared_by_tokens():
    with pytest.raises(HopeError, match=r"parallel\.sequence must be 1 with data\.packed"):
        replace(on(ParallelConfig(sequence=2)), data=DataConfig(packed=True))


def test_one_process_is_no_grid(tmp_path, text):
    said = parallel_runs.refuse(on(ParallelConfig(sequence=2)), text, tmp_path / "run")
    assert "a grid of all 1 processes" in said


def test_torchrun_trains_until_it_is_told_to_stop(tmp_path, text):
    """`torchrun -m hope train`: one run and one report; SIGTERM leaves a checkpoint."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    settings = ("parallel.data=fsdp", "train.validate_every=1e6", "train.checkpoint_every=1e6")
    options = [*runs.OPTIONS, "--steps=1000000", "--device=cpu", *(f"--set={s}" for s in settings)]
    process = subprocess.Popen(
        [*launch, "-m", "hope", "train", "--data", text, *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics, ends = tmp_path / "runs" / "hope-tiny" / "metrics.jsonl", time.monotonic() + 300
    while process.poll() is None and time.monotonic() < ends:
        if metrics.exists() and metrics.read_text().count("\n") > 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode != 0
    assert stdout.count("stopped by SIGTERM") == 1, stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["hope-tiny"]
    steps = [line["step"] for line in runs.records(metrics.parent)]
    assert steps == list(range(1, len(steps) + 1))
    assert find_checkpoint(metrics.parent).name == f"step-{steps[-1]:08d}"
    assert load_model(metrics.parent).embedding.weight.isfinite().all()
