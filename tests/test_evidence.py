"""benchmarks.evidence and benchmarks.throughput: what they write, go on with, and refuse.

No test looks at a speed."""

from __future__ import annotations

import json
import re
import signal
import statistics

import pytest
import torch
from hope import HopeError, Trainer, preset
from hope.config import override
from hope.model import parameter_count

from benchmarks import evidence, sources, throughput

NAMES = ("tiny", "tiny-transformer")
SMALL = (
    *("--set", "model.dim=16", "--set", "model.layers=1", "--set", "model.mixer.head_dim=4"),
    *("--set", "train.batch=2", "--set", "train.sequence=32"),
    *("--set", "train.validation_tokens=64"),
)


# ---- benchmarks.evidence -------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """Runs it in `tmp_path`, on a small text; returns its status."""
    text = tmp_path / "text.txt"
    text.write_text("it was the best of times, it was the worst of times\n" * 40)

    def call(*arguments: str, work: str = "work", tokens: int = 512) -> int:
        words = ("--work", str(tmp_path / work), "--data", str(text), "--tokens", str(tokens))
        out = ("--device", "cpu", "--out", str(tmp_path / "out"), "--presets", *NAMES)
        return evidence.main([*words, *out, *SMALL, *arguments])

    return call


def without_times(result: dict) -> list[dict]:
    """The runs' figures, but for their seconds."""
    curves = ("training", "validation")
    return [
        {name: value for name, value in run.items() if "second" not in name}
        | {c: {k: v for k, v in run[c].items() if k != "seconds"} for c in curves}
        for run in result["runs"]
    ]


def test_every_seed_trains_every_preset(run, tmp_path, capsys):
    assert run("--seeds", "3", "5") == 0
    (path,) = (tmp_path / "out").glob("*.json")
    result = json.loads(path.read_text())
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    runs = result["runs"]
    assert [(run["seed"], run["preset"]) for run in runs] == [
        (seed, name) for seed in (3, 5) for name in NAMES
    ]
    for one in runs:
        assert one["config"]["train"]["seed"] == one["seed"]
        assert one["tokens"] == one["config"]["train"]["tokens"] == 512
        assert one["validation"]["tokens"] == [128, 256, 384, 512]
        assert one["validation"]["bits_per_byte"][-1] == one["validation_bits_per_byte"]
    # Another seed is another model, and the seeds' runs are where they say.
    assert runs[0]["validation_bits_per_byte"] != runs[2]["validation_bits_per_byte"]
    assert (tmp_path / "work" / "seed-5" / "tiny" / "checkpoints").is_dir()
    assert "\n".join(result["table"]) in capsys.readouterr().out
    assert result["corpus"]["validation_tokens"] > 0
    rows = {row["preset"]: row for row in result["summary"]}
    bits = [one["validation_bits_per_byte"] for one in runs if one["preset"] == "tiny"]
    assert rows["tiny"]["bits_per_byte"] == {
        "mean": statistics.mean(bits),
        "deviation": statistics.stdev(bits),
        "min": min(bits),
        "max": max(bits),
    }


def test_a_difference_is_one_within_a_seed():
    def figures(name: str, seed: int, bits: float) -> dict:
        facts = {"preset": name, "seed": seed, "validation_bits_per_byte": bits}
        return {**facts, "parameters": 1, "tokens": 1, "seconds": 1.0}

    seeds = ((0, 2.0, 2.5), (1, 3.0, 3.5))
    runs = [
        figures(name, seed, value)
        for seed, *values in seeds
        for name, value in zip(NAMES, values, strict=True)
    ]
    ours, transformer = evidence.summary(runs)
    assert ours["against_baseline"] == {"mean": -0.5, "deviation": 0.0}
    assert transformer["against_baseline"] == {"mean": 0.0, "deviation": 0.0}
    (alone,) = evidence.summary(runs[:1])
    assert alone["bits_per_byte"]["deviation"] is alone["against_baseline"] is None
    assert "2.0000  2.0000" in evidence.table([alone])


def test_a_stopped_one_goes_on_and_a_finished_one_is_read(run, tmp_path, capsys, monkeypatch):
    assert run("--seeds", "0", "1", work="whole", tokens=256) == 0
    step = Trainer._train_step

    def stopped(trainer):
        if (trainer.config.train.seed, trainer.config.preset, trainer.step) == (1, "tiny", 2):
            signal.raise_signal(signal.SIGTERM)
        return step(trainer)

    monkeypatch.setattr(Trainer, "_train_step", stopped)
    assert run("--seeds", "0", "1", work="cut", tokens=256) == 130
    assert "the same command goes on" in capsys.readouterr().err
    partial = json.loads((tmp_path / "cut" / "evidence.json").read_text())
    assert [r["seed"] for r in partial["runs"]] == [0, 0]  # whole seeds
    monkeypatch.setattr(Trainer, "_train_step", step)
    assert run("--seeds", "0", "1", work="cut", tokens=256) == 0
    whole, cut = (
        json.loads((tmp_path / name / "evidence.json").read_text()) for name in ("whole", "cut")
    )
    assert without_times(whole) == without_times(cut)

    def trained(trainer):
        raise AssertionError("a finished run is trained again")

    monkeypatch.setattr(Trainer, "_train_step", trained)
    assert run("--seeds", "0", "1", work="cut", tokens=256) == 0
    again = json.loads((tmp_path / "cut" / "evidence.json").read_text())
    assert again["runs"] == cut["runs"]  # with their seconds


def test_runs_of_other_settings_are_not_mixed(run, capsys):
    assert run("--seeds", "0", tokens=64) == 0
    for words, message in (
        (("--set", "train.lr=0.5"), "these differ: train.lr (0.004 in the run, 0.5 asked for)"),
        (("--presets", "tiny", "tiny-mac"), "holds runs of tiny tiny-transformer, not of tiny"),
    ):
        with pytest.raises(SystemExit) as stop:
            run("--seeds", "0", *words, tokens=64)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", "x"])
def test_a_seed_is_a_number(run, capsys, seed):
    with pytest.raises(SystemExit) as stop:
        run(f"--seeds={seed}")
    assert stop.value.code == 2
    assert f"must be a whole number, 0 or above, not '{seed}'" in capsys.readouterr().err


def test_the_default_presets_are_of_one_size_small_and_large():
    for changes in ((), evidence.LARGE):
        configs = [override(preset(name), changes) for name in evidence.DEFAULT_PRESETS]
        fitted = evidence.same_size(configs)
        sizes = [parameter_count(config.model) for config in fitted]
        assert max(sizes) / min(sizes) < 1 + 2 * evidence.SPREAD
        assert all(abs(size / sizes[0] - 1) <= evidence.SPREAD for size in sizes)
        widths = [width for config in fitted if config.model.cms for width in config.model.mlp_dims]
        assert not changes or all(width % 16 == 0 for width in widths)  # as CUDA kernels want
        if not changes:
            assert fitted == configs  # as the presets are
        else:
            assert 30e6 < sizes[0] < 100e6


def test_only_the_width_of_the_mlp_makes_up_for_a_size():
    small = override(preset("tiny-transformer"), ["model.mlp_ratio=1"])
    _, fitted = evidence.same_size([preset("tiny"), small])
    assert fitted == override(small, [f"model.mlp_ratio={fitted.model.mlp_ratio}"])
    assert 2.5 < fitted.model.mlp_ratio < 4
    assert (8 * fitted.model.mlp_ratio).is_integer()
    wide = override(preset("tiny-transformer"), ["model.dim=512"])
    with pytest.raises(HopeError, match="no width of the MLP gives tiny-transformer the 917,696"):
        evidence.same_size([preset("tiny"), wide])


# ---- benchmarks.throughput -----------------------------------------------------------------------

TINY = (
    *("--device", "cpu", "--set", "model.dim=16", "--set", "model.layers=1"),
    *("--set", "model.mixer.head_dim=4", "--repeats", "2"),
)


def measured(tmp_path, *arguments: str) -> dict:
    assert throughput.main([*TINY, "--out", str(tmp_path), *arguments]) == 0
    (path,) = tmp_path.glob("*.json")
    return json.loads(path.read_text())


def test_steps_are_timed_at_every_length(tmp_path, capsys):
    result = measured(tmp_path, "--presets", *NAMES, "--lengths", "128", "64", "--batch", "2")
    rows = {(row["tokens"], row["preset"]): row for row in result["rows"]}
    assert set(rows) == {(tokens, name) for tokens in (64, 128) for name in NAMES}
    for (tokens, name), row in rows.items():
        assert len(row["seconds"]) == len(row["cpu_seconds"]) == 2
        assert row["warm"]
        assert row["median_seconds"] == statistics.median(row["seconds"])
        assert row["tokens_per_second"] == pytest.approx(2 * tokens / row["median_seconds"])
        assert row["peak_bytes"] is None or row["peak_bytes"] >= 0
        other = rows[tokens, "tiny-transformer"]["seconds"]
        ratios = [b / a for a, b in zip(row["seconds"], other, strict=True)]
        assert row["speed_ratio"] == statistics.median(ratios)
        if name == "tiny-transformer":
            assert row["speed_ratio"] == row["cpu_speed_ratio"] == 1
    shown = capsys.readouterr().out
    assert "\n".join(result["table"][:4]) in shown
    assert result["crossovers"]["tiny"] in shown
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert shown.splitlines()[-1] == str(picture)


def test_results_can_be_drawn_together(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(throughput, "plot_speeds", lambda *what: drawn.append(what))
    rows = [{"preset": "tiny", "tokens": t, "tokens_per_cpu_second": 1.0} for t in (64, 128)]
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, row in zip(files, rows, strict=True):
        file.write_text(json.dumps({"rows": [row], "crossovers_by": "cpu_speed_ratio"}))
    assert throughput.main(["--draw", *map(str, files)]) == 0
    assert drawn == [(rows, "tokens_per_cpu_second", tmp_path / "a.png")]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot read .*b.json"), ('{"rows": [], "crossovers_by": "speed_ratio"}', "clocks")],
)
def test_results_that_cannot_be_drawn(tmp_path, capsys, content, message):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    files[0].write_text('{"rows": [], "crossovers_by": "cpu_speed_ratio"}')
    files[1].write_text(content)
    with pytest.raises(SystemExit, match="2"):
        throughput.main(["--draw", *map(str, files)])
    assert re.search(message, capsys.readouterr().err)


def test_a_long_first_turn_is_the_only_one(tmp_path, monkeypatch):
    clock = iter((1, 2, 4))  # seconds of the first steps, and none of others
    monkeypatch.setattr(throughput.measure, "seconds_per_call", lambda *_: float(next(clock)))
    result = measured(tmp_path, "--presets", *NAMES, "--lengths", "64", "--turn-seconds", "2")
    rows = [(row["seconds"], row["warm"], row["speed_ratio"]) for row in result["rows"]]
    assert rows == [([1.0], False, 2.0), ([2.0], False, 1.0)]


def contestant(name: str, last: tuple | None) -> throughput.Contestant:
    return throughput.Contestant(preset(name), last, [{"preset": name, "reason": "was out"}, {}])


def test_what_would_not_fit_is_not_tried(monkeypatch):
    monkeypatch.setattr(throughput, "_available_bytes", lambda device: 2**30)
    why_not = throughput._why_not
    assert why_not(contestant("tiny", (64, 1.0, 2**20)), 256, "cpu", 16) is None
    assert why_not(contestant("tiny", (64, 1.1, 2**20)), 256, "cpu", 16) == (
        "may take 18 s a step (took 1.1 s at 64 tokens), more than 16 s"
    )
    assert why_not(contestant("tiny", (64, 0.1, 2**29)), 256, "cpu", 16) == (
        "may take 2.0 GiB (took 0.50 GiB at 64 tokens), and 1.0 GiB are free"
    )
    assert why_not(contestant("tiny", (64, 0.1, None)), 256, "cpu", 16) is None
    assert why_not(contestant("tiny", None), 256, "cpu", 16) == "was out"


def test_a_step_left_out_says_why_in_the_table(tmp_path, monkeypatch):
    def fail(step):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1 TiB")

    monkeypatch.setattr(throughput.TrainingStep, "__call__", fail)
    monkeypatch.setattr(throughput, "crossovers", lambda rows, clock: {})
    result = measured(tmp_path, "--presets", "tiny", "--lengths", "64")
    assert result["rows"][0]["reason"] == "out of memory: CUDA out of memory."
    assert "tiny       out of memory: CUDA out of memory." in result["table"][1]


def test_the_crossover_is_where_a_preset_stays_faster():
    def row(name: str, tokens: int, ratio: float) -> dict:
        return {"preset": name, "tokens": tokens, "cpu_speed_ratio": ratio, "speed_ratio": 9.0}

    ratios = {"a": (0.5, 1.5, 2.0), "b": (0.5, 1.5, 0.9), "c": (1.1, 1.2, 1.3)}
    rows = [
        row(name, tokens, ratio)
        for name, values in ratios.items()
        for tokens, ratio in zip((1024, 4096, 16384), values, strict=True)
    ]
    assert throughput.crossovers(rows, "cpu_speed_ratio") == {
        "a": "a: faster than tiny-transformer from 4,096 tokens on",
        "b": "b: slower than tiny-transformer up to 16,384 tokens (0.90 times its speed there)",
        "c": "c: faster than tiny-transformer from 1,024 tokens on",
    }


# ---- docs/evidence.md ----------------------------------------------------------------------------


def test_the_documents_tables_are_those_of_the_results():
    """Every block of text is some lines of the table in the file that was linked last."""
    page = sources.ROOT / "docs" / "evidence.md"
    found = re.findall(
        r"\((\.\./benchmarks/results/[\w.-]+\.json)\)|^```text\n(.*?)^```",
        page.read_text(),
        re.MULTILINE | re.DOTALL,
    )
    checked, rows = 0, []
    for path, block in found:
        if path:
            result = json.loads((page.parent / path).read_text())
            rows = [*result["table"], *result.get("crossovers", {}).values()]
            continue
        assert set(block.splitlines()) <= {"", *rows}
        checked += 1
    assert checked
