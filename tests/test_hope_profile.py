"""`hope profile`, `hope bench`, and the operations that profiles count."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hope import preset
from hope.cli import main
from hope.config import override
from hope.profile import TrainingStep, kind_of, profile_step
from torch.utils.flop_counter import FlopCounterMode

import hope_ext
from benchmarks import cms, conv, selfmod, titans, titans_deep
from benchmarks.subjects import FORWARD, TRAINING, Setting
from hope_ext import testing

SMALL = (
    *("--set", "model.dim=32", "--set", "model.layers=1", "--set", "model.mixer.heads=2"),
    *("--set", "model.mixer.head_dim=16"),
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- hope profile --------------------------------------------------------------------------------


def test_a_profile_shows_and_writes_every_operator(tmp_path, capsys):
    words = ("--device", "cpu", "--sequence", "40", "--batch", "2", "--rows", "5", *SMALL)
    assert main(["profile", "--preset", "hope-tiny-cms", *words]) == 0
    out = tmp_path / "runs" / "profile"
    result = json.loads((out / "profile.json").read_text())
    operators = {operator["name"]: operator for operator in result["operators"]}
    # Four memories of a layer; the self-modifying one; q, its gate, ...
    assert operators["hope::cms"]["calls"] == operators["hope::cms_backward"]["calls"] == 4
    assert operators["hope::selfmod"]["calls"] == 1
    assert operators["hope::selfmod"]["kind"] == "ours"
    assert operators["aten::mm"]["kind"] == "matmul"
    assert operators["aten::mm"]["flops"] > 0
    assert sum(operator["share"] for operator in operators.values()) == pytest.approx(1)
    counted = operators["hope::selfmod"]
    assert counted["flops"] == testing.selfmod_flops(80, 2, 16, counted_hidden(), 16)
    assert result["tokens_per_second"] == pytest.approx(80 / result["step_seconds"])
    assert result["peak_flops_per_second"] > 1e6
    trace = json.loads((out / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"hope::cms_backward", "step: forward", "step: backward", "step: optimizer"} <= names
    shown = capsys.readouterr().out
    first = result["operators"][0]["name"]
    assert first in shown
    assert f"{len(operators) - 5} others" in shown
    assert "runs/profile/trace.json" in shown
    assert main(["profile", "--preset", "tiny", *words]) == 0  # the next has its own directory
    assert (tmp_path / "runs" / "profile-2" / "profile.json").is_file()


def counted_hidden() -> int:
    """The hidden size of hope-tiny-cms's memories, by the model itself."""
    config = override(preset("hope-tiny-cms"), [w for w in SMALL if w != "--set"])
    step = TrainingStep(config, "cpu")
    return next(w.shape[2] for n, w in step.model.named_parameters() if n.endswith("memory.0"))


def test_the_peak_is_of_what_lives_at_once(tmp_path):
    class Allocates(TrainingStep):
        """Holds 48 MiB, then 32 MiB."""

        def __call__(self) -> None:
            for count in (3, 2):
                held = [torch.zeros(2**22) for _ in range(count)]
                del held

    config = override(preset("tiny"), ["model.dim=8", "model.layers=1", "model.mixer.heads=1"])
    result = profile_step(Allocates(config, "cpu"), tmp_path)
    assert 1 <= result.peak_bytes / (3 * 2**24) < 1.01


def test_the_model_of_a_run_is_profiled_as_it_is(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 50)
    sizes = ("--set", "train.batch=2", "--set", "train.sequence=32", "--steps", "1")
    words = ("--data", "text.txt", "--out", "run", "--device", "cpu", *sizes, *SMALL)
    assert main(["train", "--preset", "tiny", *words]) == 0
    assert main(["profile", "run", "--device", "cpu", "--out", "there"]) == 0
    config = json.loads((tmp_path / "there" / "profile.json").read_text())["config"]
    assert (config["model"]["dim"], config["train"]["sequence"]) == (32, 32)
    capsys.readouterr()
    assert main(["profile", "run", "--device", "cpu", "--set", "model.dim=64"]) == 2
    assert "the model of run is there and cannot be changed" in capsys.readouterr().err
    assert main(["profile", "absent", "--device", "cpu"]) == 2
    assert "no such run or checkpoint: absent" in capsys.readouterr().err


def test_a_training_step_is_the_trainers():
    """The weights move as under the same optimizer by hand, on the whole batch at once."""
    changes = [*(w for w in SMALL if w != "--set"), "train.batch=4", "train.sequence=8"]
    config = override(preset("tiny-transformer"), [*changes, "train.accumulate=2"])
    step, other = TrainingStep(config, "cpu"), TrainingStep(config, "cpu")
    step()
    other.model.loss(other.inputs.flatten(0, 1), other.targets.flatten(0, 1)).backward()
    torch.nn.utils.clip_grad_norm_(other.model.parameters(), config.train.clip)
    other.optimizer.step()
    for one, two in zip(step.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(one, two)
        assert one.grad is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("hope::conv", "ours"),
        ("GeneratedBackwardFor_hope_cms_default", "ours"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::mm", "matmul"),
        ("aten::convolution", "convolution"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::copy_", "memory"),
        ("autograd::engine::evaluate_function: MmBackward0", "autograd"),
        ("aten::mul", "elementwise and other"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


# ---- operations ----------------------------------------------------------------------------------


def counted(call) -> int:
    with FlopCounterMode(display=False, custom_mapping=hope_ext.flop_formulas()) as counter:
        call()
    return counter.get_total_flops()


def setting(letters: str, *sizes: int) -> Setting:
    return Setting(dict(zip(letters, sizes, strict=True)), torch.float32, "cpu")


@pytest.mark.parametrize("tokens", [60, 64])
def test_a_continuum_memory_has_the_operations_of_plain_pytorch(tokens):
    """Of a last chunk, whole or not, it learns nothing."""
    here = setting("BTDFC", 2, tokens, 16, 24, 8)
    for direction in (FORWARD, TRAINING):
        ours, plain = cms.bare(here).call(direction), cms.bare_plain(here).call(direction)
        assert counted(ours) == counted(plain) > 0


@pytest.mark.parametrize(
    ("benchmark", "here"),
    [
        (titans, setting("BTHDC", 2, 64, 2, 16, 8)),
        (titans_deep, setting("BTHDFC", 2, 64, 2, 16, 24, 8)),
    ],
    ids=["linear", "deep"],
)
def test_a_titans_memory_has_the_operations_of_its_chunked_definition(benchmark, here):
    subject = benchmark.bare(here)
    forward = counted(subject.call(FORWARD))
    with testing.backend("rounded", torch.float32):
        assert forward == counted(subject.forward)
    work = benchmark.operator_work(here)
    assert (forward, counted(subject.call(TRAINING))) == (work[FORWARD].flops, work[TRAINING].flops)


@pytest.mark.parametrize("sizes", [(2, 64, 2, 16, 8), (2, 64, 2, 16, 24, 8)])
def test_a_self_modifying_memory_has_the_operations_that_are_documented(sizes):
    here = setting("BTHDC" if len(sizes) == 5 else "BTHDFC", *sizes)
    subject, work = selfmod.bare(here), selfmod.operator_work(here)
    assert counted(subject.call(FORWARD)) == work[FORWARD].flops
    assert counted(subject.call(TRAINING)) == work[TRAINING].flops
    if "F" in here.shape:  # plain PyTorch has triangles and biases on top
        assert 1 <= counted(selfmod.bare_plain(here).forward) / work[FORWARD].flops < 1.25


def test_a_convolution_has_the_operations_of_torchs():
    here = setting("BTCK", 2, 64, 16, 4)
    padded = setting("BTCK", 2, 64 + 3, 16, 4)  # torch computes the padding's outputs, too
    ours = counted(conv.ours(padded).call(FORWARD))
    assert ours == counted(conv.torch_conv1d(here).call(FORWARD))
    assert counted(conv.ours(here).call(TRAINING)) == conv.work(here)[TRAINING].flops


def test_of_symmetric_products_half_is_counted():
    g, steps = torch.randn(2, 3, 12, 9), 4
    ours = counted(lambda: hope_ext.newton_schulz(g, steps=steps))
    with testing.backend("reference"):
        full = counted(lambda: hope_ext.newton_schulz(g, steps=steps))
    assert full - ours == 6 * steps * (9 * 9 * 12 + 9**3)


def test_attention_is_counted_on_a_cpu_as_products_are():
    q, k, v = (torch.randn(2, 3, 10, 4, requires_grad=True) for _ in range(3))

    def fused():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def plain():
        return (q @ k.mT).softmax(-1) @ v

    assert counted(fused) == counted(plain) > 0
    forward = counted(plain)
    # The backward of the fused kernel computes the scores again.
    assert counted(lambda: fused().sum().backward()) == forward + 5 * forward // 2


# ---- hope bench ----------------------------------------------------------------------------------


def test_bench_runs_the_benchmark_of_an_operator(monkeypatch):
    called = []

    def run(command, **options):
        called.append((command, options["cwd"]))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    assert main(["bench"]) == 3
    assert main(["bench", "cms", "--quick", "--shape", "1,20,16,24,8"]) == 3
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "benchmarks.ops"]
    assert called == [
        (command, root),
        ([*command, "--op", "cms", "--quick", "--shape", "1,20,16,24,8"], root),
    ]


def test_bench_prints_the_table(capfd, tmp_path):
    words = ("--quick", "--device", "cpu", "--shape", "1,20,6,3", "--out", str(tmp_path))
    assert main(["bench", "conv", *words]) == 0
    assert "torch conv1d" in capfd.readouterr().out
    assert list(tmp_path.glob("*conv-cpu.json"))


def test_bench_needs_the_checkout(tmp_path, capsys, monkeypatch):
    installed = tmp_path / "hope_ext" / "__init__.py"
    installed.parent.mkdir()
    installed.write_text("")
    spec = importlib.util.spec_from_file_location("hope_ext", installed)
    monkeypatch.setattr("hope.cli.bench.find_spec", lambda name: spec)
    assert main(["bench"]) == 2
    error = capsys.readouterr().err
    assert "the benchmarks are in the checkout" in error
    assert "pip install --no-build-isolation --no-deps -e ." in error
