"""Which device is chosen, and which sizes CUDA's kernels take; without a GPU."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from hope import HopeError, Trainer, load_corpus, preset
from hope.config import override
from hope.continual import learn_config
from hope.continual.evaluation import ContinualEvaluation, Curriculum, Pupil
from hope.device import check_sizes, choose_device
from hope.evaluate import TASKS, Evaluation, equal_sized
from hope.evaluate.evaluation import small
from hope.presets import PRESETS
from hope.profile import TrainingStep
from hope.provenance import provenance

import hope_ext
from hope_ext.testing import CUDA_HEAD_SIZES


@pytest.mark.parametrize(
    ("gpu", "kernels", "chosen", "warned"),
    [
        (False, True, "cpu", False),
        (True, True, "cuda", False),
        (True, False, "cpu", True),  # slower than somebody may expect, so it is said
    ],
)
def test_auto_is_a_gpu_that_there_are_kernels_for(monkeypatch, gpu, kernels, chosen, warned):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(hope_ext, "has_cuda_kernels", lambda: kernels)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert choose_device("auto").type == chosen
    assert ["no CUDA kernels" in str(warning.message) for warning in said] == [True] * warned


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("tiny", ["model.mixer.head_dim=24"], "model.mixer.head_dim must be 16, .* not 24"),
        ("hope-tiny", ["model.mixer.head_dim=8"], "model.mixer.head_dim must be 16, .* not 8"),
        ("hope-tiny-cms", ["model.dim=120"], "model.dim must be a multiple of 16 .* not 120"),
        (
            "hope-attention-tiny",
            ["model.mlp_ratio=3.75"],
            r"mlp_ratio .* not 120: .* \(480\) .* 64",
        ),
    ],
)
def test_sizes_without_a_kernel_are_named(name, settings, message):
    model = override(preset(name), settings).model
    check_sizes(model, "cpu")
    with pytest.raises(HopeError, match=message):
        check_sizes(model, "cuda")


def test_sizes_that_need_no_kernel_are_free():
    model = override(preset("tiny-transformer"), ["model.mixer.head_dim=24"]).model
    check_sizes(model, "cuda")
    reads = override(preset("hope-attention-tiny"), ["model.dim=120", "model.cms.updates=false"])
    check_sizes(reads.model, "cuda")


def test_the_head_sizes_are_those_of_the_kernels():
    for size in (8, 16, 24, 32, 48, 64, 96, 128, 256):
        model = override(preset("tiny"), [f"model.mixer.head_dim={size}"]).model
        try:
            check_sizes(model, "cuda")
        except HopeError:
            assert size not in CUDA_HEAD_SIZES
        else:
            assert size in CUDA_HEAD_SIZES


@pytest.mark.parametrize("name", PRESETS)
def test_presets_run_on_cuda(name):
    check_sizes(preset(name).model, "cuda")


@pytest.mark.parametrize("task", TASKS)
def test_small_models_of_tasks_run_on_cuda(task):
    """(A second continuum memory may need other widths to be as large as the first one.)"""
    names = ("hope-tiny-cms", "tiny", "hope-tiny")
    for config in equal_sized([small(preset(n), TASKS[task], 7) for n in names]):
        check_sizes(config.model, "cuda")


def test_nothing_is_written_for_a_model_that_cannot_run(tmp_path):
    config = override(preset("tiny"), ["model.mixer.head_dim=8", "train.sequence=32"])
    (tmp_path / "text").write_text("a text " * 99)
    corpus, out = load_corpus([str(tmp_path / "text")], 32), tmp_path / "out"
    begin = {
        "train": lambda: Trainer(config, corpus, out, "cuda"),
        "profile": lambda: TrainingStep(config, "cuda"),
        "evaluate": lambda: Evaluation(
            TASKS["recall"],
            [small(preset("tiny"), TASKS["recall"], 1, ["model.mixer.head_dim=8"])],
            out,
            "cuda",
        ),
        "continual": lambda: ContinualEvaluation(
            Curriculum(), [Pupil("tiny", config, learn_config(config))], out, "cuda"
        ),
    }
    for call in begin.values():
        with pytest.raises(HopeError, match="head_dim"):
            call()
    assert not out.exists()


def test_a_result_says_where_it_comes_from(monkeypatch):
    monkeypatch.setattr("sys.argv", [str(Path("bin", "hope")), "evaluate", "lm", "a run"])
    facts = json.loads(json.dumps(provenance("cpu")))
    assert facts["command"] == "hope evaluate lm 'a run'"
    assert facts["date"].endswith("+00:00")
    assert facts["torch"] == torch.__version__
    assert facts["build"]["version"] == hope_ext.__version__
    assert facts["device"] == "cpu"
    assert {"cpu", "cores", "threads", "os", "python", "gpu"} < set(facts)
