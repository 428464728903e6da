"""How the benchmarks measure on a GPU, shown without one: its clock and its programs are faked."""

from __future__ import annotations

import os
import re
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import measure, ops, peers, profiling, report, sources, subjects, titans
from benchmarks.measure import Pace
from benchmarks.session import Session
from benchmarks.subjects import BACKWARD, FORWARD, PASSES, TRAINING, Contest, Row, Setting
from hope_ext import titans as titans_module

SETTING = Setting({"B": 1, "T": 12, "H": 2, "D": 8, "C": 4}, torch.float32, "cpu")

# ---- bounds --------------------------------------------------------------------------------------

# The designs' table for these two shapes in bfloat16: GFLOP and MB, forward and backward.
R1 = {"B": 8, "T": 4096, "H": 16, "D": 64, "C": 64}
R2 = {"B": 4, "T": 8192, "H": 8, "D": 128, "C": 64}


@pytest.mark.parametrize(
    ("shape", "forward", "backward"),
    [(R1, (30.1, 275), (81.6, 482)), (R2, (51.5, 272), (142, 476))],
)
def test_bounds_follow_from_the_shape(shape, forward, backward):
    assert tuple(shape.values()) in titans.BENCHMARK.shapes["cuda"]
    setting = Setting(shape, torch.bfloat16, "cuda")
    bounds = titans.bounds(setting)
    for direction, (gflop, megabytes) in {FORWARD: forward, BACKWARD: backward}.items():
        assert bounds[direction].flops / 1e9 == pytest.approx(gflop, rel=2e-3)
        assert bounds[direction].bytes / 1e6 == pytest.approx(megabytes, abs=0.5)
    work = titans.operator_work(setting)
    assert work[FORWARD] == bounds[FORWARD]
    both = bounds[FORWARD].bytes + bounds[BACKWARD].bytes
    assert work[TRAINING].bytes == both
    again = 6 * shape["D"] ** 2 * shape["B"] * shape["T"] * shape["H"]
    assert work[TRAINING].flops == bounds[FORWARD].flops + bounds[BACKWARD].flops - again


@pytest.mark.parametrize("shape", [R1, R2])
def test_the_check_reaches_past_a_group_of_chunks(shape):
    """The backward computes the states between two checkpoints again, a group at a time."""
    arguments = titans.check_arguments(Setting(shape, torch.bfloat16, "cpu"))
    q, v, weights, chunk = (arguments[n] for n in ("q", "v", "weights", "chunk_size"))
    group = chunk * titans_module._chunks_per_checkpoint(q, v, weights, chunk, has_momentum=True)
    assert group < q.shape[1]
    assert q.shape[1] % chunk  # and the last chunk is not whole
    assert (q.shape[0], *q.shape[2:], chunk) == (2, shape["H"], shape["D"], shape["C"])


# ---- time ----------------------------------------------------------------------------------------


class FakeEvent:
    """A CUDA event of a GPU on which a flush takes 1 ms, and the call 5."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.fixture
def fake_gpu(monkeypatch):
    def pass_time(milliseconds):
        FakeEvent.now += milliseconds

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30 + 2**27)
    monkeypatch.setattr(measure, "_l2_flush", lambda: lambda: pass_time(1.0))
    monkeypatch.setattr(report, "clocks", lambda: {"clocks.sm": "1980 MHz"})
    return pass_time


def test_gpu_times_are_without_the_flushes(fake_gpu):
    pace, before = Pace(calls=4, flushes=3), FakeEvent.now
    assert measure.seconds_per_call(lambda: fake_gpu(5.0), pace, "cuda") == pytest.approx(5e-3)
    assert FakeEvent.now - before == pytest.approx(4 * (5 + 3))


def test_flushes_cover_what_the_cpu_needs_to_issue_a_call():
    pace = measure.gpu_pace(seconds=1e-4, host_seconds=2.5e-4, flush_seconds=1e-4)
    assert pace.flushes == 5  # one, and 1.5 times 0.25 ms of them
    assert pace.calls == 67  # 0.1 ms and 0.5 ms of flushes, 40 ms in all
    assert pace.host_seconds == 2.5e-4
    assert measure.gpu_pace(1e-2, 0, 1e-4).calls == 2
    assert measure.gpu_pace(1.0, 1.0, 1e-4) == Pace(1, measure.MOST_FLUSHES, 1.0)


class FakeSubject(subjects.Subject):
    """Its call only passes the fake GPU's time."""

    def call(self, direction):
        return lambda: self.forward(direction)


def gpu_operator(fake_gpu):
    """The Titans benchmark, with rows that only pass the fake GPU's time."""

    def row(name, forward_ms, **options):
        times = {FORWARD: forward_ms, TRAINING: 3 * forward_ms}

        def prepare(setting):
            work = titans.operator_work(setting)
            return FakeSubject(lambda direction: fake_gpu(times[direction]), (), 32768, work)

        return Row(name, prepare, **options)

    rows = (row("reference", 50.0, at=titans.fewer_tokens), row("theirs", 1.0), row("ours", 0.5))
    contests = {"cuda": (Contest("operator", rows, "theirs"),)}
    return replace(titans.BENCHMARK, contests=contests)


def test_a_table_of_a_gpu(fake_gpu, monkeypatch):
    """790 TFLOP/s and 4.3 TB/s."""
    for roof in measure.ROOFS["cuda"]:
        ms = 1e3 * (roof.work.flops / 790e12 or roof.work.bytes / 4.3e12)
        monkeypatch.setitem(vars(roof), "prepare", lambda ms=ms: lambda: fake_gpu(ms))
    monkeypatch.setattr(measure, "_flush_seconds", lambda: 1e-3)
    session = Session(gpu_operator(fake_gpu), "cuda", 3, with_memory=True)
    setting = Setting(R1, torch.bfloat16, "cuda")
    session.measure(setting)
    rows = {(row["pass"], row["row"]): row for row in session.rows}
    ours = rows[FORWARD, "ours"]
    assert ours["median_ms"] == pytest.approx(0.5)
    assert ours["roof_ms"] == pytest.approx(0.0639, abs=1e-4)  # 275 MB, more than 30.1 GFLOP
    assert ours["percent_of_roof"] == pytest.approx(12.8, abs=0.1)
    assert ours["speed_ratio"] == pytest.approx(2.0)
    assert ours["host_ms"] >= 0
    assert ours["peak_bytes"] == 2**27
    reference = rows[FORWARD, "reference"]
    assert reference["measured_at"] == {**R1, "T": titans.REFERENCE_TOKENS}
    assert "speed_ratio" not in reference
    forward, backward = session.bounds
    assert forward["times_bound"] == pytest.approx(0.5 / 0.0639, rel=2e-3)
    assert backward["ms"] == pytest.approx(1.0)
    assert backward["bound_ms"] == pytest.approx(0.112, abs=5e-4)
    table = session.table(setting)
    assert re.search(r"^reference \(T=256\) +50\.000", table, re.MULTILINE)
    assert "backward: 1.000 ms, 8.91 times its bound of 0.112 ms (81.6 GFLOP, 482 MB)" in table
    assert [found["clocks"] for found in session.clocks] == [{"clocks.sm": "1980 MHz"}] * 2


def test_an_operator_without_cuda_kernels_is_not_timed_on_a_gpu(capsys, monkeypatch):
    def refused():
        with pytest.raises(SystemExit) as stop:
            ops.main(["--op", "conv", "--device", "cuda"])
        assert stop.value.code == 2
        return capsys.readouterr().err

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda: torch sees no GPU here" in refused()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(report, "cuda_stems", lambda: ["titans"])
    assert "conv has no CUDA kernels in this build" in refused()


def test_clocks_are_those_that_nvidia_smi_says(monkeypatch):
    answer = "1980 MHz, 2619 MHz, 1980 MHz, 140.31 W, 35\n1980 MHz, 2619 MHz, 1980 MHz, 9 W, 30"
    monkeypatch.setattr(sources, "output", lambda *command: answer)
    assert report.clocks()["power.draw"] == "140.31 W"
    monkeypatch.setattr(sources, "output", lambda *command: None)
    assert report.clocks() is None


# ---- peers that compile --------------------------------------------------------------------------


def good_peer(setting: Setting):
    return titans.bare(setting)


def slow_peer(setting: Setting):
    time.sleep(600)


def dying_peer(setting: Setting):
    os._exit(1)


def failing_peer(setting: Setting):
    raise ImportError("no module named fla")


def test_peers_compile_in_a_process_of_their_own():
    rows = [Row("good", good_peer), Row("fails", failing_peer), Row("dies", dying_peer)]
    reasons = peers.compile_first([(row, SETTING) for row in rows], seconds=300)
    assert reasons == {
        **{("fails", str(SETTING), p): "fails: ImportError: no module named fla" for p in PASSES},
        **{("dies", str(SETTING), p): "its process ended early" for p in PASSES},
    }


def test_peers_that_compile_for_too_long_are_left_out(monkeypatch):
    row = Row("slow", slow_peer, peer="titans-pytorch", compiles=True)
    monkeypatch.setattr(peers, "why_not", lambda peer: None)
    contests = {"cpu": (Contest("operator", (row, Row("ours", titans.bare)), "slow"),)}
    session = Session(replace(titans.BENCHMARK, contests=contests), "cpu", 2, with_memory=False)
    session.compile_peers([SETTING], seconds=1)
    session.measure(SETTING)
    rows = {(row["pass"], row["row"]): row for row in session.rows}
    for direction in PASSES:
        assert rows[direction, "slow"]["reason"] == "not compiled within 1 s"
        assert "median_ms" in rows[direction, "ours"]
        assert "speed_ratio" not in rows[direction, "ours"]


# ---- Nsight Compute ------------------------------------------------------------------------------


def test_a_kernel_report_says_why_there_is_none(tmp_path, monkeypatch):
    setting = Setting(SETTING.shape, torch.bfloat16, "cuda")
    monkeypatch.setattr(sources, "find_tool", lambda name: None)
    said = profiling.kernel_report(titans.BENCHMARK, setting, tmp_path / "titans")
    assert "kernel report unavailable: no ncu" in said
    broken = tmp_path / "ncu"
    broken.write_text("#!/bin/sh\necho no permission to read the counters; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sources, "find_tool", lambda name: str(broken))
    said = profiling.kernel_report(titans.BENCHMARK, setting, tmp_path / "titans")
    assert re.search("unavailable: .*--set full: no permission.*--set basic: no permission", said)


def test_a_kernel_report_is_of_one_call_of_the_operator(tmp_path, monkeypatch):
    """A stand-in for ncu, which writes its file and the command that it got."""
    ncu = tmp_path / "ncu"
    ncu.write_text(
        '#!/bin/sh\necho "$@"\ncase "$1" in --set) ;; *) exit 0;; esac\n'
        'while [ "$1" != --export ]; do shift; done; echo report >"$2.ncu-rep"\n'
    )
    ncu.chmod(0o755)
    monkeypatch.setattr(sources, "find_tool", lambda name: str(ncu))
    setting = Setting(SETTING.shape, torch.bfloat16, "cuda")
    said = profiling.kernel_report(titans.BENCHMARK, setting, tmp_path / "titans")
    assert f"--import {tmp_path / 'titans.ncu-rep'} --page details" in said
    assert said.endswith(f"\n{tmp_path / 'titans.ncu-rep'}")
