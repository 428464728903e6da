"""The benchmarks: what they write down, what they refuse, what they say about a missing peer.

No test looks at a speed."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hope_ext
from benchmarks import (
    cms,
    conv,
    measure,
    ops,
    peers,
    report,
    selfmod,
    session,
    sources,
    subjects,
    titans,
    train,
)
from benchmarks.measure import Pace, Samples
from benchmarks.subjects import FORWARD, PASSES, TRAINING, Row, Setting, Work
from hope_ext import _load

TINY = "1,12,2,8,4"  # the titans benchmark's B,T,H,D,C
SETTING = Setting({"B": 1, "T": 12, "H": 2, "D": 8, "C": 4}, torch.float32, "cpu")
TRAIN = (
    *("--tokens", "256", "--set", "model.dim=16", "--set", "model.layers=1"),
    *("--set", "train.batch=2", "--set", "train.sequence=32", "--set", "train.validate_every=2"),
    *("--set", "train.validation_tokens=64"),
)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A sample is one call."""
    monkeypatch.setitem(measure.SAMPLE_SECONDS, "cpu", 1e-9)


def run_ops(out: Path, *arguments: str) -> tuple[int, list[dict]]:
    """The exit status of a quick run on the CPU, and the results that it wrote."""
    words = ["--op", "titans", "--device", "cpu", "--shape", TINY, "--out", str(out), *arguments]
    status = ops.main([*words, "--quick"])
    return status, [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]


@pytest.fixture
def no_peers(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda peer: None)


# ---- benchmarks.ops ------------------------------------------------------------------------------


def test_a_result_holds_every_row_and_the_facts_around_it(tmp_path, capsys):
    status, results = run_ops(tmp_path)
    (result,) = results
    assert status == 0
    assert {
        *("benchmark", "op", "command", "date", "device", "environment", "neighbours"),
        *("warning", "peers", "roofs", "memory", "checks", "rows", "table"),
        *("bounds", "clocks", "left_out"),
    } == set(result)
    assert {
        *("cpu", "cores", "threads", "capability", "os", "python", "torch", "hope_ext"),
        *("commit", "uncommitted_changes", "sources_sha256"),
    } == set(result["environment"])
    assert result["environment"]["hope_ext"] == hope_ext.build_info()
    assert result["peers"]["titans-pytorch"]["pinned"] == "0.5.5"
    (checks,) = result["checks"].values()
    assert {"output 0", "gradient of q", "gradient of weights"} <= {c["name"] for c in checks}
    assert all(check["error"] <= check["allowed"] for check in checks)
    (roof,) = result["roofs"]
    rows = {(row["contest"], row["pass"], row["row"]): row for row in result["rows"]}
    for direction in PASSES:
        for contest, name in (
            *(("operator", roof), ("operator", "reference"), ("operator", "ours")),
            *(("layer", roof), ("layer", "titans-pytorch"), ("layer", "ours")),
        ):
            row = rows.pop((contest, direction, name))
            assert row["shape"] == {"B": 1, "T": 8, "H": 2, "D": 8, "C": 4}  # cut down by --quick
            if "reason" in row:
                assert name == "titans-pytorch"
                assert "pip install .[bench]" in row["reason"]
                continue
            assert len(row["samples_ms"]) == ops.QUICK_REPEATS
            low, high = row["quartiles_ms"]
            assert 0 < low <= row["median_ms"] <= high
            assert row["gflop_per_second"] > 0
            if name != roof:
                assert row["tokens_per_second"] > 0
                assert row["percent_of_roof"] > 0
    assert rows == {}
    assert "\n".join(result["table"]) in capsys.readouterr().out


def test_the_convolution_has_rows_that_are_bound_by_memory(tmp_path, no_peers):
    words = ("--op", "conv", "--shape", "1,20,6,3")
    status, (result,) = run_ops(tmp_path, *words)
    assert status == 0
    assert list(result["roofs"]) == ["roof: copy"]
    for direction in PASSES:
        rows = {row["row"]: row for row in result["rows"] if row["pass"] == direction}
        assert set(rows) == {"roof: copy", "reference", "torch conv1d", "ours"}
        ours = rows["ours"]
        assert ours["roof_ms"] == pytest.approx(
            ours["work"]["bytes"] / (2 * 2**27) * rows["roof: copy"]["median_ms"]
        )
        assert ours["speed_ratio_to"] == "torch conv1d"


def test_torch_and_ours_compute_the_same_convolution():
    setting = Setting({"B": 2, "T": 9, "C": 5, "K": 3}, torch.float32, "cpu")
    rows = (conv.reference, conv.torch_conv1d, conv.ours)
    first, *others = (prepare(setting).forward() for prepare in rows)
    for other in others:
        torch.testing.assert_close(other, first)


def test_nothing_is_begun_when_the_time_is_over(tmp_path, capsys, monkeypatch, no_peers):
    clock = iter([0.0, *(10.0 * i for i in range(1, 100))])  # every look at it is 10 s later
    monkeypatch.setattr(session.time, "monotonic", lambda: next(clock))
    run = session.Session(titans.BENCHMARK, "cpu", 2, with_memory=False, deadline=25.0)
    run.measure(SETTING)
    assert {(row["contest"], row["pass"]) for row in run.rows} == {
        ("operator", direction) for direction in PASSES
    } | {("layer", FORWARD)}
    assert run.left_out == [f"{SETTING}: layer, forward+backward: no time left"]
    assert "left out: B=1 T=12 H=2 D=8 C=4 float32: layer, forward+" in run.table(SETTING)


def test_a_result_never_replaces_another(tmp_path, no_peers):
    run_ops(tmp_path)
    _, results = run_ops(tmp_path)
    assert len(results) == 2


def test_rows_without_their_peer_say_how_to_install_it(tmp_path, capsys, no_peers):
    status, (result,) = run_ops(tmp_path)
    assert status == 0
    rows = [row for row in result["rows"] if row["row"] == "titans-pytorch"]
    assert [row["reason"] for row in rows] == ["not installed: pip install .[bench]"] * len(PASSES)
    assert all("speed_ratio" not in row for row in result["rows"] if row["contest"] == "layer")
    assert result["peers"]["titans-pytorch"]["installed"] is None
    assert "not installed: pip install .[bench]" in capsys.readouterr().out


def test_another_version_of_a_peer_is_not_measured(monkeypatch):
    assert peers.installed("hope-ext-has-no-such-peer") is None
    monkeypatch.setattr(peers, "installed", lambda peer: "0.0.1")
    assert peers.why_not("causal-conv1d") is None  # not pinned: any will do
    assert peers.why_not("titans-pytorch") == "version 0.0.1 instead of 0.5.5: pip install .[bench]"


def test_a_peer_that_fails_says_why_and_ours_may_not_fail(monkeypatch):
    def fail(setting):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(peers, "why_not", lambda peer: None)
    theirs = Row("theirs", fail, peer="titans-pytorch")
    assert session.prepare(theirs, SETTING, FORWARD) == "fails: RuntimeError: no kernel image"
    with pytest.raises(RuntimeError):
        session.prepare(Row("ours", fail), SETTING, FORWARD)


def test_operators_are_timed_without_the_packages_of_the_layers(tmp_path, monkeypatch, no_peers):
    monkeypatch.setitem(sys.modules, "hope", None)
    status, (result,) = run_ops(tmp_path)
    assert status == 0
    ours = [row for row in result["rows"] if row["row"] == "ours"]
    assert ["median_ms" in row for row in ours] == [True, True, False, False]
    assert [row.get("reason") for row in ours[2:]] == ["not installed: hope"] * 2


def wrong_value(o: torch.Tensor) -> torch.Tensor:
    return 1.01 * o


def wrong_gradient(o: torch.Tensor) -> torch.Tensor:
    return 1.01 * o - 0.01 * o.detach()


def not_a_number(o: torch.Tensor) -> torch.Tensor:
    return o + math.nan


@pytest.mark.parametrize("mistake", [wrong_value, wrong_gradient, not_a_number])
def test_a_wrong_operator_is_not_timed(tmp_path, capsys, monkeypatch, mistake):
    right = hope_ext.titans_memory

    def wrong(**arguments):
        o, state = right(**arguments)
        return (o if _load.use_reference() else mistake(o)), state

    monkeypatch.setattr(hope_ext, "titans_memory", wrong)
    status, results = run_ops(tmp_path)
    assert status == 1
    assert results == []
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "nothing is timed" in shown.err
    named = "gradient of v" if mistake is wrong_gradient else "output 0"
    assert re.search(rf"{named}: error \S+ against the float64 definition, \S+ allowed", shown.err)
    if mistake is wrong_gradient:
        assert "output" not in shown.err


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("1,2,3", "expected 5 sizes B,T,H,D,C, got '1,2,3'"),
        ("1,2,3,4,x", "a size must be a whole number above 0, not 'x'"),
        ("1,2,3,4,0", "a size must be a whole number above 0, not '0'"),
    ],
)
def test_a_shape_must_be_sizes(capsys, shape, message):
    with pytest.raises(SystemExit) as stop:
        ops.main(["--shape", shape])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_deep_memory_has_a_benchmark(tmp_path, no_peers):
    words = ("--op", "titans-deep", "--shape", "1,20,2,16,32,8")
    status, (result,) = run_ops(tmp_path, *words)
    assert status == 0
    timed = {(r["contest"], r["row"]) for r in result["rows"] if "median_ms" in r}
    assert {("operator", "reference"), ("operator", "ours"), ("layer", "ours")} <= timed


@pytest.mark.parametrize(
    ("op", "shape"), [("selfmod", "1,20,2,16,24,8"), ("selfmod-linear", "1,20,2,16,8")]
)
def test_the_self_modifying_memory_has_a_benchmark(tmp_path, no_peers, op, shape):
    status, (result,) = run_ops(tmp_path, "--op", op, "--shape", shape)
    assert status == 0
    timed = {r["row"] for r in result["rows"] if "median_ms" in r}
    assert {"reference", "plain PyTorch", "ours"} <= timed


def test_the_multi_frequency_step_has_a_benchmark(tmp_path):
    """It has no backward to be timed, and a roof of bytes."""
    status, (result,) = run_ops(tmp_path, "--op", "multifreq", "--shape", "3,64")
    assert status == 0
    assert list(result["roofs"]) == ["roof: copy"]
    rows = {(r["contest"], r["row"]): r for r in result["rows"] if r["row"] != "roof: copy"}
    assert {row["pass"] for row in rows.values()} == {FORWARD}
    assert rows["adamw", "ours"]["work"]["bytes"] == 28 * 3 * 64
    assert rows["adamw", "ours"]["speed_ratio_to"] == "torch AdamW, fused"
    slow = rows["adamw", "ours, periods 1, 4, 16, 64"]["work"]["bytes"]
    assert slow == 64 * (28 + (32 + 1) + (32 + 0.25))
    assert rows["sgd", "ours"]["work"]["bytes"] == 12 * 3 * 64


def test_the_newton_schulz_iteration_has_a_benchmark(tmp_path):
    status, (result,) = run_ops(tmp_path, "--op", "newton_schulz", "--shape", "2,12,9", "1,9,12")
    assert status == 0
    assert len(result["checks"]) == 2
    timed = {row["row"] for row in result["rows"] if "median_ms" in row}
    assert {"reference", "torch.optim.Muon", "ours"} <= timed


@pytest.mark.parametrize("hidden", [{"F": 24}, {}], ids=["deep", "linear"])
def test_plain_pytorch_computes_the_same_self_modifying_memory(hidden):
    shape = dict(zip("BTHDC", (2, 20, 2, 16, 8), strict=True)) | hidden
    setting = Setting(shape, torch.float64, "cpu")

    def results(subject):
        torch.manual_seed(0)  # the output's gradient
        return subject.forward(), *subject.call(TRAINING)()

    ours, plain = results(selfmod.bare(setting)), results(selfmod.bare_plain(setting))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_the_continuum_memory_system_has_a_benchmark(tmp_path, no_peers):
    status, (result,) = run_ops(tmp_path, "--op", "cms", "--shape", "1,20,16,24,8")
    assert status == 0
    timed = {r["row"] for r in result["rows"] if "median_ms" in r}
    assert {"reference", "plain PyTorch", "ours"} <= timed


def test_plain_pytorch_computes_the_same_continuum_memory_system():
    shape = dict(zip("BTDFC", (2, 20, 16, 24, 8), strict=True))
    setting = Setting(shape, torch.float64, "cpu")

    def results(subject):
        torch.manual_seed(0)  # the output's gradient
        return subject.forward(), *subject.call(TRAINING)()

    ours, plain = results(cms.bare(setting)), results(cms.bare_plain(setting))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_threads_are_set_and_written_down(tmp_path, no_peers):
    before = torch.get_num_threads()
    try:
        _, (result,) = run_ops(tmp_path, "--threads", "1")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert result["environment"]["threads"] == 1
    assert "1 threads" in result["table"][0]


def test_profile_writes_a_trace_of_each_of_our_rows(tmp_path, capsys):
    status, results = run_ops(tmp_path, "--profile")
    assert status == 0
    assert len(results) == 2  # the operator and the layer
    for trace in results:
        names = {event.get("name") for event in trace["traceEvents"]}
        assert {"hope::titans", "hope::titans_backward"} <= names
    shown = capsys.readouterr().out
    assert "hope::titans" in shown
    assert "kernel report unavailable: it is about kernels on a GPU" in shown


# ---- measuring -----------------------------------------------------------------------------------


def test_calls_are_timed_in_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    samples = measure.in_turns(calls, {"a": Pace(2), "b": Pace(1)}, 2, "cpu")
    assert order == ["a", "a", "a", "b"] * 2  # the first of a row of calls is not timed
    assert [len(s.seconds) for s in samples.values()] == [2, 2]


def test_a_ratio_compares_within_a_turn():
    one, other = Samples([1.0, 10.0, 2.0], Pace(1)), Samples([2.0, 20.0, 4.0], Pace(1))
    assert measure.ratio(one, other) == 2.0


def test_the_slower_kind_of_work_is_the_roof():
    roofs = [
        measure.Roof(f"{flops} {moved}", "", Work(flops, moved), lambda: lambda: None)
        for flops, moved in ((100, None), (0, 100))
    ]
    times = {roofs[0]: Samples([1.0], Pace(1)), roofs[1]: Samples([2.0], Pace(1))}
    assert measure.least_seconds(Work(300, 100), times) == 3.0
    assert measure.least_seconds(Work(100, 400), times) == 8.0
    assert measure.least_seconds(Work(100), times) == 1.0
    assert measure.least_seconds(Work(0), times) == 0.0


def allocate(setting: Setting):
    """A row whose call holds 16 MiB for each chunk at its peak, and whose making holds more."""
    count = setting.shape["T"] // setting.shape["C"]
    torch.ones(2 * count, 2**22).sum()
    leaf = torch.ones((), requires_grad=True)
    work = {direction: Work(1) for direction in PASSES}
    return subjects.Subject(lambda: leaf * torch.ones(count, 2**22).sum(), (leaf,), 1, work)


@pytest.mark.skipif(not measure.can_measure_memory("cpu"), reason="Linux's way of measuring")
def test_peak_memory_is_that_of_the_call_alone():
    small = Setting({**SETTING.shape, "T": 4}, torch.float32, "cpu")
    peak = measure.peak_on_cpu(Row("allocates", allocate), SETTING, TRAINING, small)
    assert 0.95 < peak / (3 * 2**24) < 1.05


def test_a_pass_is_without_gradients_or_with_all_of_them():
    leaves = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    enabled = []

    def forward():
        enabled.append(torch.is_grad_enabled())
        return leaves[0] * leaves[1]

    subject = subjects.Subject(forward, leaves, 1, {})
    subject.call(FORWARD)()
    assert [gradient.shape for gradient in subject.call(TRAINING)()] == [(3,), (3,)]
    assert enabled == [False, True]


def test_bytes_of_the_passes():
    x, y = torch.empty(10, dtype=torch.bfloat16), torch.empty(3)
    # Forward x, y; backward x, the gradient of y, the gradient of x.
    assert subjects.moved([x], [y]) == {FORWARD: 20 + 12, TRAINING: (20 + 12) + (20 + 12 + 20)}


def test_work_of_the_convolution():
    work = conv.work(Setting({"B": 8, "T": 4096, "C": 3072, "K": 4}, torch.bfloat16, "cuda"))
    rows, taps = 2 * 8 * 4096 * 3072, 4 * 3072 * 4
    assert work[FORWARD] == Work(8 * 8 * 4096 * 3072, 2 * rows + taps)
    assert work[TRAINING] == Work(4 * work[FORWARD].flops, 5 * rows + 3 * taps)


def test_work_is_the_operators_and_grows_with_the_layers_projections():
    bare = titans.bare(SETTING)
    layer = titans.our_layer(SETTING)
    dim, heads = 16, 2
    maps = dim * 3 * dim + dim * 4 * heads + dim * dim  # q, k, v; rates and gate; output
    assert bare.work[FORWARD].bytes == 12 * heads * (4 * 8 * 4 + 12)
    assert layer.work[FORWARD].flops - bare.work[FORWARD].flops == 2 * 12 * maps
    assert layer.work[TRAINING].flops - bare.work[TRAINING].flops == 6 * 12 * maps


# ---- reporting -----------------------------------------------------------------------------------


def test_tables_are_aligned_and_a_reason_may_be_of_any_width():
    text = report.table(("row", "ms", "x"), [("ours", "10", "2"), ("a peer", "not here at all")])
    assert text.splitlines() == ["row     ms  x", "ours    10  2", "a peer  not here at all"]


def test_a_loaded_machine_gets_a_warning():
    quiet = {"load_average_at_start": (0.1, 0, 0), "others_cores": 0.01}
    assert report.loaded(quiet) is None
    assert report.loaded({**quiet, "others_cores": None}) is None
    assert "load average 99.00" in report.loaded({**quiet, "load_average_at_start": (99, 0, 0)})
    assert "others used 0.50 cores" in report.loaded({**quiet, "others_cores": 0.5})


def test_the_hash_of_the_sources_sees_every_byte(tmp_path, monkeypatch):
    names = ["hope_ext/titans.py", "hope_ext/_titans_autograd.py", "build_config.py"]
    names += ["csrc/titans/titans.cpp", "csrc/common/host.h"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    hashes = {sources.sources_hash("titans")}
    for name in names:
        (tmp_path / name).write_text(f"{name} changed")
        hashes.add(sources.sources_hash("titans"))
    assert len(hashes) == 1 + len(names)


def test_a_copy_without_git_has_the_commit_that_it_is_told(tmp_path, monkeypatch):
    """Also where it lies in another project's checkout."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setattr(sources, "ROOT", tmp_path / "copy")
    sources.ROOT.mkdir()
    monkeypatch.setenv("HOPE_COMMIT", "abc")
    assert sources.revision() == {"commit": "abc", "uncommitted_changes": None}


# ---- benchmarks.train ----------------------------------------------------------------------------


def test_training_side_by_side_writes_curves_and_a_picture(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("it was the best of times, it was the worst of times\n" * 40)
    out = tmp_path / "out"
    words = ("--device", "cpu", "--data", str(text), "--out", str(out))
    assert train.main([*words, "--presets", "tiny", "tiny-transformer", *TRAIN]) == 0
    (path,) = out.glob("*.json")
    result = json.loads(path.read_text())
    assert [run["preset"] for run in result["runs"]] == ["tiny", "tiny-transformer"]
    for run in result["runs"]:
        assert run["tokens"] == 256
        assert run["parameters"] > 0
        assert run["training"]["tokens"] == [64, 128, 192, 256]
        assert run["validation"]["tokens"] == [128, 256]
        assert run["validation"]["seconds"][-1] == pytest.approx(run["seconds"], abs=1e-3)
        assert run["validation"]["bits_per_byte"][-1] == run["validation_bits_per_byte"] > 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "\n".join(result["table"]) in capsys.readouterr().out


def test_trainings_that_read_different_batches_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--device", "cpu", "--presets", "tiny", "125m"])
    assert stop.value.code == 2
    assert "125m and tiny cannot be compared: train.batch is 64 and 16" in capsys.readouterr().err
