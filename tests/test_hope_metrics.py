"""Where a run's numbers go: JSON lines, TensorBoard, wandb; each step once, also when resumed."""

import json
import pkgutil
import sys
import types

import pytest
import runs
from hope import HopeError, Trainer, load_corpus
from hope.cli import main

event_accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator",
    reason="TensorBoard is not installed: pip install .[test]",
)
BOTH = runs.training(tensorboard=True, wandb="memories")


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(runs.TEXT)
    return load_corpus([str(path)], window=32)


class Wandb(types.ModuleType):
    """What is used of wandb; as its server, it refuses a step that it has."""

    def __init__(self):
        super().__init__("wandb")
        self.calls, self.records, self.finished = [], {}, 0

    def init(self, **options):
        json.dumps(options["config"])
        self.calls.append(options)
        return self

    def log(self, values, step):
        self.records.setdefault(step, {})
        for name, value in values.items():
            self.records[step].setdefault(name, value)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", module := Wandb())
    return module


def scalars(out):
    """What TensorBoard shows: {tag: [(step, value), ...]}."""
    reader = event_accumulator.EventAccumulator(str(out / "tensorboard"))
    reader.Reload()
    return {
        tag: [(event.step, event.value) for event in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


def by_field(lines):
    """The same of the JSON lines."""
    found = {}
    for line in lines:
        for name, value in line.items():
            if name != "step":
                found.setdefault(name, []).append((line["step"], pytest.approx(value, rel=1e-6)))
    return found


def test_the_fields_of_a_record(tmp_path, corpus):
    Trainer(runs.CONFIG, corpus, tmp_path / "run").run(progress=False)
    step, _, validation = runs.records(tmp_path / "run")[:3]
    assert list(step) == [
        *("step", "tokens", "train_bits_per_byte", "gradient_norm", "lr"),
        *("tokens_per_second", "seconds"),
    ]
    assert list(validation) == ["step", "tokens", "validation_bits_per_byte"]


def test_tensorboard_and_wandb_get_what_the_json_lines_say(tmp_path, corpus, wandb):
    Trainer(BOTH, corpus, tmp_path / "run").run(progress=False)
    lines = runs.records(tmp_path / "run")
    assert scalars(tmp_path / "run") == by_field(lines)
    for line in lines:
        assert {**line, **wandb.records[line["step"]]} == {**wandb.records[line["step"]], **line}
    assert sorted(wandb.records) == list(range(1, 9))
    (call,) = wandb.calls
    assert (call["project"], call["name"], call["resume"]) == ("memories", "run", "allow")
    assert call["config"]["train"]["wandb"] == "memories"
    assert wandb.finished == 1


def test_a_resumed_run_shows_every_step_once(tmp_path, corpus, wandb):
    out = tmp_path / "run"
    trainer = Trainer(BOTH, corpus, out)

    def crash():
        raise MemoryError

    runs.interrupt(trainer, 6, crash)
    with pytest.raises(MemoryError):
        trainer.run(progress=False)
    assert [step for step, _ in scalars(out)["lr"]] == [1, 2, 3, 4, 5]
    Trainer(BOTH, corpus, out, resume=True).run(progress=False)  # from step 4
    assert scalars(out) == by_field(runs.records(out))
    assert [step for step, _ in scalars(out)["lr"]] == list(range(1, 9))
    assert sorted(wandb.records) == list(range(1, 9))
    first, second = wandb.calls
    assert first["id"] == second["id"]


def noting(events, name, function):
    def noted(*arguments, **options):
        events.append(name)
        return function(*arguments, **options)

    return noted


def test_writers_keep_nothing_back_that_is_before_a_checkpoint(tmp_path, corpus, monkeypatch):
    """What a kill takes from a writer is written again only if it is from after the checkpoint."""
    events = []
    for name in ("Metrics.write", "Metrics.flush", "save_checkpoint"):
        owner, _, function = f"hope.train.trainer.{name}".rpartition(".")
        owner = pkgutil.resolve_name(owner)

        monkeypatch.setattr(owner, function, noting(events, function, getattr(owner, function)))
    Trainer(runs.training(tokens=2 * 128), corpus, tmp_path / "run").run(progress=False)
    assert events == ["write", "write", "write", "flush", "save_checkpoint"]


@pytest.mark.parametrize(
    ("module", "setting"),
    [("wandb", {"wandb": "memories"}), ("tensorboard", {"tensorboard": True})],
)
def test_a_missing_package_is_named_before_anything_is_written(
    tmp_path, corpus, monkeypatch, module, setting
):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    message = rf"train.{module} needs the package {module}.*pip install 'hope_ext\[{module}\]'"
    with pytest.raises(HopeError, match=message):
        Trainer(runs.training(**setting), corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_writes_events(tmp_path, corpus, capsys):
    options = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
    assert main(["train", *options, *runs.OPTIONS, "--set", "train.tensorboard=true"]) == 0
    assert len(scalars(tmp_path / "run")["validation_bits_per_byte"]) == 4
