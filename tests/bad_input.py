"""Every command line that is wrong: what a test may know about an option, from the parser alone.

`commands` walks the parser; `rows` derives from each option what can be wrong with it, so that
a new option has its rows at once, and one of an unknown kind has to be described in `_faults`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from hope.cli import _parser, main
from hope.evaluate import TASKS
from runs import OPTIONS, TEXT
from safetensors.torch import load_file, save_file

_SMALL = (
    "--data text.txt --set model.dim=16 --set model.layers=1 --set model.mixer.heads=2 "
    "--set model.mixer.head_dim=8 --set train.batch=2 --set train.sequence=16 "
    "--set train.tokens=32 --set train.validation_tokens=32"
)
_TASK = "--steps 1 --set model.dim=16 --set model.mixer.head_dim=8 --set train.batch=1"
# A right call of every command, in the directory that `make_place` makes. A wrong one is this with
# more after it; where it writes, `--out` or the last word says where to.
CALLS = {
    "train": shlex.join(["train", "--data=text.txt", *OPTIONS, "--out=new"]),
    "compare": f"compare tiny tiny-transformer {_SMALL} --out new",
    "learn": "learn --checkpoint run --text text.txt --old text.txt --out new",
    "generate": "generate run --length 2",
    "export": "export run new",
    "tokenizer": "tokenizer --data text.txt --vocab-size 260 --out new",
    "shards": "shards --data text.txt --out new",
    "evaluate lm": "evaluate lm run --data text.txt --out new",
    "evaluate needle": "evaluate needle run --length 128 --depth 0 --examples 1 --out new",
    "evaluate harness": "evaluate harness run --tasks none --include_path tasks --out new",
    "evaluate continual": (
        "evaluate continual tiny --first 300 --tokens 300 --held-out 300 --segment 8 "
        "--set model.dim=16 --set model.layers=1 --set train.batch=1 --set train.sequence=16 "
        "--set train.validation_tokens=32 --out new"
    ),
    **{f"evaluate {name}": f"evaluate {name} tiny {_TASK} --out new" for name in TASKS},
    "memory": "memory tiny",
    "profile": "profile run --sequence 8 --batch 1 --set train.seed=0 --out new",
    "bench": "bench none",
    "info": "info",
}
LONG = "x" * 300  # no file system takes such a name


class Row(NamedTuple):
    """A wrong call: its arguments, how it ends and what it prints (a pattern)."""

    command: str
    arguments: str
    message: str
    status: int = 2


# What must be said of a run or checkpoint that is damaged so, by every command that reads one.
DAMAGES = {
    "absent": "no such run or checkpoint: absent",
    "empty": "there is no checkpoint in empty",
    "text.txt": "there is no checkpoint in text.txt",
    "text.txt/below": "no such run or checkpoint: text.txt/below",
    "begun": "there is no checkpoint in begun",
    "truncated": "cannot read the weights in truncated/.*model.safetensors",
    "no-safetensors": "cannot read the weights in no-safetensors/.*model.safetensors",
    "foreign": "foreign/.*model.safetensors is of another model: .* is absent there",
    "mismatched": r"mismatched/.*model.safetensors is of another model: .*shape \[264, 16\] .*24",
    "no-config": "cannot read no-config/.*config.json: No such file or directory",
    "broken-config": "cannot read broken-config/.*config.json: Expecting",
    "deep-config": "cannot read deep-config/.*config.json: .*recursion",
    "other-config": "other-config/.*config.json is not the config of a run: unknown field",
    "config-directory": "cannot read config-directory/.*config.json: Is a directory",
    LONG: "File name too long",
}
# Damage that a resumed training alone, or a reader alone, meets.
RESUMED = {
    "no-state": "cannot resume from no-state/.*state is missing",
    "empty-state": "empty-state/.*metadata is missing or damaged",
    "cut-state": "cut-state/.* is truncated",
    "no-metrics": "metrics.jsonl is not the metrics of a run",
    "other-metrics": "metrics.jsonl has a line without a step",
}
READ = {
    "not-finite": "not-finite/.*model.safetensors is damaged: .* not finite",
    "broken-tokenizer": "broken-tokenizer/.*tokenizer.json is not a tokenizer.json",
    "tokenizer-directory": "cannot read the tokenizer tokenizer-directory/.*: Is a directory",
}


def make_place(place: Path) -> None:
    """Fills the working directory `place` with texts, a run, and copies of it that are damaged."""
    for name in ("empty", "full", "tasks"):
        (place / name).mkdir()
    for name, content in {
        "text.txt": TEXT,
        "empty.txt": "",
        "full/file": "",
        "lines.jsonl": '{"text": "a text"}\n',
        "broken.jsonl": '{"text"\n',
        "number.jsonl": '{"text": 3}\n',
    }.items():
        (place / name).write_text(content)
    (place / "binary").write_bytes(b"\0\xff" * 99)
    (place / "broken.parquet").write_bytes(b"no table" * 9)
    assert main([*shlex.split(CALLS["train"]), "--out=run", "--set=train.tokens=256"]) == 0
    weights = load_file(_checkpoint(place / "run") / "model.safetensors")

    def damaged(name: str) -> Path:
        shutil.copytree(place / "run", place / name)
        return _checkpoint(place / name)

    (place / "begun").mkdir()
    shutil.copy(place / "run" / "metrics.jsonl", place / "begun")
    for name, content in {"truncated": b"\0" * 200, "no-safetensors": b"hello"}.items():
        (damaged(name) / "model.safetensors").write_bytes(content)
    save_file({"w": torch.zeros(3)}, damaged("foreign") / "model.safetensors")
    nothing = {name: weight * torch.nan for name, weight in weights.items()}
    save_file(nothing, damaged("not-finite") / "model.safetensors")
    for name, change in {"mismatched": {"dim": 24}, "other-config": {"new": 1}}.items():
        path = damaged(name) / "config.json"
        config = json.loads(path.read_text())
        config["model"] |= change
        path.write_text(json.dumps(config))
    (damaged("no-config") / "config.json").unlink()
    for name, text in {"broken-config": "{", "deep-config": "[" * 100_000}.items():
        (damaged(name) / "config.json").write_text(text)
    for name, file in {
        "config-directory": "config.json",
        "tokenizer-directory": "tokenizer.json",
    }.items():
        path = damaged(name) / file
        path.unlink(missing_ok=True)
        path.mkdir()
    (damaged("broken-tokenizer") / "tokenizer.json").write_text("{}")
    shutil.rmtree(damaged("no-state") / "state")
    for path in (damaged("empty-state") / "state").iterdir():
        path.unlink()
    for path in (damaged("cut-state") / "state").glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    for name, lines in {"no-metrics": b"\xff\n", "other-metrics": b"[1]\n"}.items():
        damaged(name)
        (place / name / "metrics.jsonl").write_bytes(lines)


def _checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


# ---- rows ----------------------------------------------------------------------------------------


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every command that runs something, by its words: "evaluate lm"."""

    def below(parser: argparse.ArgumentParser, words: str) -> Iterator[tuple[str, object]]:
        groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not groups:
            yield words, parser
        for group in groups:
            for name, child in group.choices.items():
                yield from below(child, f"{words} {name}".strip())

    return dict(below(_parser(), ""))


def rows() -> list[Row]:
    found = [Row(*row) for row in _OTHERS]
    for command, parser in commands().items():
        for action in parser._actions:
            if not isinstance(action, argparse._HelpAction):
                found += [Row(command, *fault) for fault in _faults(command, action)]
    return found


def _faults(command: str, action: argparse.Action) -> list[tuple]:
    """The rows of one option, without the command; KeyError for an option of an unknown kind."""
    name, call = (action.option_strings or [""])[0], CALLS[command]
    if action.choices is not None:
        faults = [(f"{call} {name} none", f"argument {name}: invalid choice: 'none'")]
        if action.dest == "device":
            faults.append((f"{call} --device cuda", "--device cuda: torch sees no GPU here"))
        return faults
    if action.type in (int, float) or getattr(action.type, "__name__", "") == "positive":
        low = _OUT_OF_RANGE.get((command, name), _OUT_OF_RANGE.get(name, "-1"))
        faults = [(f"{call} {name} many", f"argument {name}: .*'many'")]
        if (command, name) == ("evaluate needle", "--seed"):
            return faults  # any number will do
        faults += [
            (f"{call} {name} {low}", f"{action.dest.replace('_', '[-_]')}.*{low}"),
        ]
        if action.type is float:
            faults.append((f"{call} {name} nan", f"{action.dest}.*nan"))
        return faults
    return _KINDS[action.dest](command, call, name)


# A number that the option does not take, where that is not -1.
_OUT_OF_RANGE = {"--seed": str(2**70), "--depth": "2"}


def _run_faults(command: str, call: str, name: str) -> list[tuple]:
    before, after = call.split(" run", 1)
    damages = DAMAGES | READ
    if command == "export":  # copies the weights as they are
        del damages["not-finite"]
    if command == "profile":  # reads no text
        del damages["broken-tokenizer"], damages["tokenizer-directory"]
    return [
        (f"{before} {path}{after}", message) + ((1,) if path == LONG else ())
        for path, message in damages.items()
    ]


def _resume_faults(command: str, call: str, name: str) -> list[tuple]:
    if command in ("train",):
        damages = DAMAGES | RESUMED
        return [
            (f"{command} --resume --out {path}", message) + ((1,) if path == LONG else ())
            for path, message in damages.items()
        ]
    short = f"{command} --resume --out"
    return [
        (f"{short} {path}", f"there is no \\w+ in {path}|no such run or checkpoint: {path}")
        for path in ("absent", "empty", "text.txt")
    ]


def _text_faults(command: str, call: str, name: str) -> list[tuple]:
    return [
        (f"{call} {name} absent.txt", "no such file or directory: absent.txt"),
        (f"{call} {name} empty", "no files in the directory empty"),
        (f"{call} {name} '*.none'", r"no file matches \*.none"),
        (f"{call} {name} empty.txt", "empty.txt is empty"),
        (f"{call} {name} binary", "binary is not UTF-8 text"),
        (f"{call} {name} broken.jsonl", "broken.jsonl, line 1 is not JSON"),
        (f"{call} {name} number.jsonl", "number.jsonl, line 1: 'text' must be text, not int"),
        (f"{call} {name} broken.parquet", "cannot read broken.parquet: "),
        (f"{call} {name} hf:", "a data set is hf:NAME"),
        (f"{call} {name} {LONG}", "File name too long", 1),
    ]


def _file_faults(command: str, call: str, name: str) -> list[tuple]:
    return [
        (f"{call} {name} absent", "cannot read .*absent: No such file or directory"),
        (f"{call} {name} full", "cannot read .*full: Is a directory"),
        (f"{call} {name} binary", "binary.* not "),
        (f"{call} {name} {LONG}", "File name too long"),
    ]


def _folder_faults(command: str, call: str, name: str) -> list[tuple]:
    return [
        (f"{call} {name} {path}", f"must be a directory .*{path}")
        for path in ("absent", "text.txt")
    ]


def _out_faults(command: str, call: str, name: str) -> list[tuple]:
    """Of a new directory, or of a file; the last --out counts."""
    call = call.removesuffix("new") if command == "export" else f"{call} --out "
    if command in _WRITE_FILES:
        return [
            (f"{call}full", "full (exists|is a directory)"),
            (f"{call}absent/new", "there is no directory absent"),
            (f"{call}text.txt/new", "there is no directory text.txt"),
            (f"{call}{LONG}", "File name too long", 1),
        ]
    return [
        (f"{call}full", "full is not empty"),
        (f"{call}text.txt", "text.txt is not empty"),
        (f"{call}text.txt/new", "text.txt.*: (Not a directory|File exists)", 1),
        (f"{call}{LONG}", "File name too long", 1),
    ]


_WRITE_FILES = ("tokenizer", "evaluate lm", "evaluate needle", "evaluate harness")


def _set_faults(command: str, call: str, name: str) -> list[tuple]:
    unused = {}
    if command.removeprefix("evaluate ") in TASKS:
        unused = {
            f"{setting}={value}": f"--set {setting} has no effect"
            for setting, value in {
                "train.accumulate": "1 --set train.batch=2 --set train.accumulate=2",
                "train.checkpoint_activations": "true",
                "data": "'[\"text.txt\"]'",
            }.items()
        }
    return [
        (f"{call} --set {setting}", message)
        for setting, message in {
            **unused,
            "model.none=3": "there is no setting 'model.none'",
            "none.dim=3": "there is no group of settings 'none'",
            "model.dim": "an override looks like model.dim=192, not 'model.dim'",
            "model.dim=wide": "model.dim must be of type int, not 'wide'",
            "model.dim=0": "model.dim must be at least 1, not 0",
            "model.dim=1e30": "model.dim must be a number of 64 bits",
            "train.lr=NaN": "train.lr must be a finite number, not nan",
            "train.seed=-1": r"train.seed must be in \[0, 2\*\*63\), not -1",
            "model.mixer=none": "model.mixer.kind must be one of .*, not 'none'",
            f"model.dim={'[' * 100_000}": r"model.dim must be of type int, not '\[\[",
        }.items()
    ]


def _preset_faults(command: str, call: str, name: str) -> list[tuple]:
    first, *rest = call.split(" tiny", 1)
    return [(f"{first} none{rest[0]}", "none")]


def _nothing(*_: str) -> list[tuple]:
    return []


# By where an option's value goes: what can be wrong with it.
_KINDS = {
    "run": _run_faults,
    "checkpoint": _run_faults,
    "resume": _resume_faults,
    "data": _text_faults,
    "text": _text_faults,
    "old": _text_faults,
    "tokenizer": _file_faults,
    "haystack": _file_faults,
    "include_path": _folder_faults,
    "out": _out_faults,
    "set": _set_faults,
    "presets": _preset_faults,
    "field": lambda command, call, name: [
        (f"{call} --data lines.jsonl --field none", "lines.jsonl, line 1 has no field 'none'")
    ],
    "tasks": _nothing,  # tests/test_hope_harness.py has wrong ones: the harness is slow to know
    "prompt": lambda command, call, name: [(f"{call} --prompt \udcff", "prompt must be text")],
    "anew": _nothing,
    "download": _nothing,
    "op": _nothing,  # another process says what is wrong: tests/test_hope_profile.py
    "options": _nothing,
}

# What more than one option says.
_OTHERS = [
    ("train", "train --resume --out run --set train.lr=0.5", r"these differ: train.lr \("),
    ("train", "train --resume --out run --preset 125m", "a run of preset .*, not '125m'"),
    ("train", "train --tokens 1 --steps 1", "not allowed with argument"),
    (
        "train",
        f"{CALLS['train']} --set model.vocab_size=8",
        "model.vocab_size must be at least 257",
    ),
    ("compare", "compare tiny --data text.txt", "a comparison needs two presets or more"),
    ("compare", "compare tiny tiny --data text.txt", "preset 'tiny' is named twice"),
    ("learn", "learn --text text.txt", "--checkpoint is missing"),
    ("learn", "learn --checkpoint run", "--text is missing"),
    ("learn", "learn --resume --out run", "run is no run of hope learn"),
    ("learn", f"{CALLS['learn']} --method cms", "needs a model with a CMS"),
    ("tokenizer", "tokenizer --vocab-size 300", "required: --out"),
    ("shards", "shards", "required: --out"),
    ("generate", "generate", "required: run"),
    ("export", "export run", "required: out"),
    ("info", "info none", "unrecognized arguments: none"),
    ("none", "none", "invalid choice: 'none'"),
    ("", "", "required: COMMAND"),
]
