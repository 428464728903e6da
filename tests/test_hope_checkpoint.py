"""Checkpoints: what is in them comes back, and what is wrong with one is said."""

import errno
import json
import multiprocessing
import os
import resource
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import runs
import torch
import torch.distributed as dist
from hope import (
    CmsConfig,
    HopeError,
    LanguageModel,
    RunConfig,
    Trainer,
    load_config,
    load_corpus,
    load_model,
)
from hope import checkpoint as checkpoints
from hope.checkpoint import find_checkpoint, save_checkpoint
from hope.cli import main
from hope.tokenizers import train_tokenizer
from hope.train import make_optimizer
from hope.training_state import load_state, save_state
from torch import nn
from torch.distributed.fsdp import fully_shard

# Processes of their own that need not import torch again.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["hope.cli", "hope.training_state", "torch.distributed.fsdp"])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(runs.TEXT)
    return str(path)


@pytest.fixture(scope="module")
def corpus(text):
    return load_corpus([text], window=32)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus):
    out = tmp_path_factory.mktemp("finished") / "run"
    Trainer(runs.CONFIG, corpus, out).run(progress=False)
    return out


@pytest.fixture
def run(tmp_path, finished):
    """A finished run that a test may break."""
    return shutil.copytree(finished, tmp_path / "run")


def resume(run, corpus):
    return Trainer(load_config(find_checkpoint(run)), corpus, run, resume=True)


# ---- what comes back -----------------------------------------------------------------------------

PACED = RunConfig(
    model=replace(runs.MODEL, mlp_ratio=2.0, cms=CmsConfig((4, 8))),
    train=replace(runs.TRAIN, level_periods=(1, 3)),
)


@pytest.mark.parametrize("config", [runs.CONFIG, PACED], ids=["AdamW", "MultiFrequency"])
def test_model_optimizer_and_trainer_come_back_bitwise(tmp_path, corpus, config):
    trainer = Trainer(config, corpus, tmp_path / "run")
    for _ in range(4):  # in the middle of a period of 3
        trainer._train_step()
    state = trainer._state()
    save_state(tmp_path / "state", trainer.model, trainer.optimizer, state)
    other = Trainer(
        replace(config, train=replace(config.train, seed=9)), corpus, tmp_path / "other"
    )
    numbers = load_state(tmp_path / "state", other.model, other.optimizer, other._state())
    assert torch.equal(numbers.pop("random"), state.pop("random"))
    assert numbers == state
    for a, b in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    same_optimizer(trainer.optimizer, other.optimizer)


def same_optimizer(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for index, state in a["state"].items():
        assert state.keys() == b["state"][index].keys()
        for name, value in state.items():
            other = b["state"][index][name]
            assert type(value) is type(other)
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other)
                assert value.dtype == other.dtype
            else:
                assert value == other


def two_layers():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def test_a_parameter_without_a_gradient_stays_without_moments(tmp_path):
    model, optimizer = two_layers()
    model[0](torch.randn(3, 4)).sum().backward()
    optimizer.step()
    save_state(tmp_path / "state", model, optimizer, {"step": 1})
    other, others = two_layers()
    assert load_state(tmp_path / "state", other, others, {"step": 0}) == {"step": 1}
    same_optimizer(optimizer, others)
    assert len(others.state) == 2


def test_one_process_reads_what_a_group_has_written(tmp_path):
    model, optimizer = two_layers()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
        model(torch.randn(3, 4)).sum().backward()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        optimizer.step()
        save_state(tmp_path / "state", model, optimizer, {"step": 1})
        weights = [parameter.full_tensor().detach() for parameter in model.parameters()]
        moments = [optimizer.state[p]["exp_avg"].full_tensor() for p in model.parameters()]
    finally:
        dist.destroy_process_group()
    other, others = two_layers()
    load_state(tmp_path / "state", other, others, {"step": 0})
    for parameter, weight, moment in zip(other.parameters(), weights, moments, strict=True):
        assert torch.equal(parameter, weight)
        assert torch.equal(others.state[parameter]["exp_avg"], moment)


def write_as_a_rank(rank, folder):
    """One of two processes that train a model in shards, and write its checkpoint."""
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = LanguageModel(runs.MODEL)
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)))
    optimizer = make_optimizer(model, runs.TRAIN)
    one_step(model, optimizer)
    save_checkpoint(folder / "run", 1, runs.CONFIG, model, optimizer, {"step": 1}, keep=1)
    assert [path.name for path in (folder / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    dist.destroy_process_group()


def one_step(model, optimizer):
    tokens = torch.arange(66).reshape(2, 33)
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()


def test_two_ranks_write_one_checkpoint_which_a_process_alone_reads(tmp_path):
    processes = [PROCESSES.Process(target=write_as_a_rank, args=(r, tmp_path)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    checkpoint = find_checkpoint(tmp_path / "run")
    assert {path.name for path in (checkpoint / "state").iterdir()} == {
        *(".metadata", "__0_0.distcp", "__1_0.distcp")
    }
    model = LanguageModel(runs.MODEL)
    optimizer = make_optimizer(model, runs.TRAIN)
    numbers = checkpoints.load_state(checkpoint, model, optimizer, {"step": 0})
    assert numbers == {"step": 1}
    torch.manual_seed(0)
    alone = LanguageModel(runs.MODEL)
    alone_optimizer = make_optimizer(alone, runs.TRAIN)
    one_step(alone, alone_optimizer)
    exported = load_model(checkpoint).state_dict()
    for name, weight in alone.named_parameters():
        own = model.get_parameter(name)
        assert torch.equal(exported[name], own)
        torch.testing.assert_close(own, weight)
        torch.testing.assert_close(
            optimizer.state[own]["exp_avg"], alone_optimizer.state[weight]["exp_avg"]
        )


# ---- what is wrong -------------------------------------------------------------------------------

FILES = ("config.json", "model.safetensors", "state/.metadata", "state/__0_0.distcp")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(run, corpus, name, share):
    path = find_checkpoint(run) / name
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(HopeError, match=f"cannot read .*{path.name}"):
        resume(run, corpus)


@pytest.mark.parametrize("name", FILES)
def test_a_foreign_file_is_named(run, corpus, name):
    path = find_checkpoint(run) / name
    size = path.stat().st_size
    path.write_bytes((b"\x80\x04not one of ours\xff" * size)[:size])
    with pytest.raises(HopeError, match=f"cannot read .*{path.parent.name}"):
        resume(run, corpus)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(run, corpus, name):
    path = find_checkpoint(run) / name
    path.unlink()
    with pytest.raises(HopeError, match=f"cannot read .*{path.name}"):
        resume(run, corpus)


def test_a_missing_state_is_named_and_the_model_still_loads(run, corpus):
    checkpoint = find_checkpoint(run)
    shutil.rmtree(checkpoint / "state")
    with pytest.raises(HopeError, match=r"cannot resume from .*step-00000008/state is missing"):
        resume(run, corpus)
    assert load_model(run).config == runs.MODEL
    (checkpoint / "trainer.pt").touch()
    with pytest.raises(HopeError, match="was written by an older version"):
        resume(run, corpus)


@pytest.mark.parametrize("part", ["model.safetensors", "state"])
@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"dim": 24}, r"embedding.weight is of shape \[\d+, 24\] there, but of shape \[\d+, 16\]"),
        ({"layers": 2}, r"blocks.1.\S+ is of shape \S.* there, but absent in the model"),
    ],
)
def test_another_models_file_is_named(tmp_path, run, corpus, part, change, difference):
    other = replace(runs.training(tokens=128), model=replace(runs.MODEL, **change))
    Trainer(other, corpus, tmp_path / "other").run(progress=False)
    own, foreign = find_checkpoint(run) / part, find_checkpoint(tmp_path / "other") / part
    if own.is_dir():
        shutil.rmtree(own)
        shutil.copytree(foreign, own)
    else:
        shutil.copy(foreign, own)
    with pytest.raises(HopeError, match=rf"{part} is of another model: {difference}"):
        resume(run, corpus)


def test_another_optimizers_state_is_refused(run, corpus, tmp_path):
    """A state of the same weights, but without what the optimizer has to know."""
    checkpoint = find_checkpoint(run)
    shutil.rmtree(checkpoint / "state")
    model = LanguageModel(runs.MODEL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    numbers = Trainer(runs.CONFIG, corpus, tmp_path / "new")._state()
    save_state(checkpoint / "state", model, optimizer, numbers)
    with pytest.raises(HopeError, match=r"cannot read the training state.*param_groups"):
        resume(run, corpus)


def test_a_config_of_something_else_is_named(run):
    path = find_checkpoint(run) / "config.json"
    path.write_text(json.dumps({"hidden_size": 12}))
    with pytest.raises(HopeError, match=r"config.json is not the config of a run: unknown field"):
        load_model(run)


def test_a_broken_checkpoint_can_be_removed_for_the_one_before(run, corpus):
    """As docs/training.md tells."""
    shutil.rmtree(find_checkpoint(run))
    assert resume(run, corpus).step == 6


# ---- a full disk ---------------------------------------------------------------------------------


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "where", ["hope.checkpoint.save_file", "hope.training_state.dcp.save", "os.rename"]
)
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, corpus, monkeypatch, where):
    trainer = Trainer(runs.CONFIG, corpus, tmp_path / "run")
    runs.interrupt(trainer, 4, lambda: monkeypatch.setattr(where, full))
    message = "cannot write the checkpoint of step 4: No space left on device; the newest one, "
    with pytest.raises(OSError, match=f"{message}step-00000002, is whole") as error:
        trainer.run(progress=False)
    assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert resume(tmp_path / "run", corpus).step == 2


@pytest.mark.parametrize("limit", [3_000, 40_000], ids=["weights", "state"])
def test_files_that_may_not_grow_are_an_error_with_the_systems_reason(
    tmp_path, corpus, monkeypatch, capsys, text, limit
):
    """The writers' own errors, which are of many kinds; a file of this size is refused to them."""
    weights = LanguageModel(runs.MODEL)
    size = sum(4 * parameter.numel() for parameter in weights.parameters())
    assert 3_000 < size < 40_000 < 3 * size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        status = main(["train", "--data", text, "--out", str(tmp_path / "run"), *runs.OPTIONS])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1
    error = capsys.readouterr().err
    assert "cannot write the checkpoint of step 2: File too large; there is none yet" in error
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_metrics_that_cannot_be_written_are_named(tmp_path, corpus):
    trainer = Trainer(runs.training(checkpoint_every=99, validate_every=99), corpus, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(OSError, match="cannot write the metrics of step 3: File") as error:
            trainer.run(progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.filename == str(tmp_path / "metrics.jsonl")


def test_a_disk_that_is_full_in_truth(tmp_path, text):
    """A small file system of memory, on which the first checkpoint has a place and no second."""
    disk = tmp_path / "disk"
    disk.mkdir()
    train = [sys.executable, "-m", "hope", "train", "--data", text, "--out", str(disk / "run")]
    script = (
        f"mount -t tmpfs -o size=400k none {disk} || exit 99; {shlex.join(train + runs.OPTIONS)}; "
        f"echo status $?; ls -A {disk}/run/checkpoints"
    )
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if "status" not in done.stdout:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    assert done.stdout.split("status ")[1] == "1\nstep-00000002\n"
    message = "cannot write the checkpoint of step 4: No space left on device; the newest one, "
    assert f"{message}step-00000002, is whole" in done.stderr
    assert "Traceback" not in done.stderr


# ---- export --------------------------------------------------------------------------------------


def test_export_copies_a_model_that_loads(run, tmp_path, capsys):
    tokenizer = find_checkpoint(run) / "tokenizer.json"
    train_tokenizer([b"some text"], 260).save(tokenizer.parent)
    out = tmp_path / "models" / "mine"
    assert main(["export", str(run), str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {
        *("model.safetensors", "config.json", "tokenizer.json")
    }
    assert (out / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    tokenizer.unlink()
    (out / "tokenizer.json").unlink()  # what it says is not the point here
    assert str(out / "model.safetensors") in capsys.readouterr().out
    for name, weight in load_model(out).state_dict().items():
        assert torch.equal(weight, load_model(run).state_dict()[name])
    assert main(["generate", str(out), "--length", "3"]) == 0


def test_export_refuses_what_it_must_not_write_or_cannot_read(run, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes").touch()
    assert main(["export", str(run), str(tmp_path / "taken")]) == 2
    assert "taken is not empty; choose another directory" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "absent"), str(tmp_path / "out")]) == 2
    assert "no such run or checkpoint" in capsys.readouterr().err
    weights = find_checkpoint(run) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert "cannot read the weights in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
