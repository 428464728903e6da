"""Learning one text, once: a directory like a training run's, and what it has changed.

A run is a directory: `checkpoints/` (ordinary ones, which also hold `learner.pt`, its state),
`metrics.jsonl` (what every few segments cost before they were learned from), `loss.png` and, when
the text is read, `learn.json`.
"""

import json
import math
import pickle
import shutil
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from hope.checkpoint import find_checkpoint, has_checkpoint, load_config, load_model, named_errors
from hope.config import LearnConfig, from_dict, to_dict
from hope.continual.learner import Learner
from hope.data import Corpus, MappedTokens, Tokens, load_corpus
from hope.errors import HopeError
from hope.files import atomic_directory, atomic_file
from hope.plot import plot_loss
from hope.provenance import provenance
from hope.tokenizers import load_tokenizer
from hope.train import bits_per_byte
from hope.train.metrics import JsonLines
from hope.train.signals import StopSignals

FILE = "learn.json"
_WEIGHTS, _TOKENIZER, _LEARNER = "model.safetensors", "tokenizer.json", "learner.pt"
_RECORD = 1024  # tokens of a record in metrics.jsonl
_COUNTS = ("step", "seconds", "position", "nats", "bytes")  # of a LearnRun; saved
# Settings that pending gradients and moments belong to.
_LASTING = ("method", "segment", "chunks", "rule")


@dataclass(frozen=True)
class Lesson:
    """What is learned: by the model of a run or checkpoint, from the files of `text`.

    old: files of what it should not forget; none: the validation side of what it was trained on.
    """

    checkpoint: str
    text: tuple[str, ...]
    old: tuple[str, ...]
    learn: LearnConfig


@dataclass(frozen=True)
class LearnResult:
    """Bits per byte of held-out new and old text before and after, and of the text while read.

    signal: what stopped it early; then there is no `after`.
    """

    before: dict[str, float]
    after: dict[str, float] | None
    read: float | None
    tokens: int
    seconds: float
    signal: signal.Signals | None
    files: dict[str, Path]


class LearnRun:
    """Learns `lesson` in the directory `out`, which must be new or empty.

    resume: goes on from the newest checkpoint in `out`, exactly where it was left. Otherwise from
    lesson.checkpoint: if that has learned before, with what is pending there and the state that it
    carries, unless `anew`.

    The text is split as a training's is; the validation side is what it is judged by. Raises
    HopeError where directories, texts or settings do not fit.
    """

    def __init__(
        self,
        lesson: Lesson,
        out: Path,
        device: str | torch.device = "cpu",
        *,
        resume: bool = False,
        anew: bool = False,
    ) -> None:
        self.lesson, self.out = lesson, out
        if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
            way = "continue that run with --resume"
            if not has_checkpoint(out):
                way = "there is no checkpoint to continue from, so remove it"
            raise HopeError(f"{out} is not empty; {way}, or choose another --out")
        source = find_checkpoint(out if resume else Path(lesson.checkpoint))
        self.config = load_config(source)
        self.tokenizer = load_tokenizer(source)
        # The config and, where there is one, the tokenizer, as they are.
        self._files = {file.name: file.read_bytes() for file in source.glob("*.json")}
        self.corpus = self._corpus(lesson.text, source)
        try:
            old = self._corpus(lesson.old or self.config.data.paths, source)
        except HopeError as error:
            hint = "" if lesson.old else "; --old names other text than what the run was trained on"
            raise HopeError(f"{error}{hint}") from error
        # Of files that are named, all is held out.
        self.old = _joined(old.train, old.validation) if lesson.old else old.validation
        self.descriptions = {"new": self.corpus.description, "old": old.description}
        self.learner = Learner(load_model(source, device), self.config, lesson.learn)
        self.step, self.seconds, self.position = 0, 0.0, 0
        self.nats, self.bytes = 0.0, 0
        self.before: dict[str, float] = {}
        self._saved_at: int | None = None
        state = learned_state(source)
        if resume and state is None:
            raise HopeError(f"{out} is no run of hope learn: there is no learner's state in it")
        if resume:
            self._resume(source, state)
        elif state is not None and not anew:
            check_goes_on(state, lesson.learn)
            self._load_learner(source, state)

    def _corpus(self, paths: tuple[str, ...], source: Path) -> Corpus:
        """A text in the model's own tokens."""
        own = source / _TOKENIZER
        tokenizer = str(own) if own.exists() else None
        data = replace(self.config.data, paths=paths, tokenizer=tokenizer)
        return load_corpus(data, self.config.train.sequence)

    @property
    def tokens(self) -> int:
        """How much of the text can be read: every token but the last is followed by one."""
        return len(self.corpus.train) - 1

    def run(self, *, progress: bool = True) -> LearnResult:
        """Reads to the text's end, or until SIGINT or SIGTERM: then it finishes the segment.

        It ends with a checkpoint in both cases. progress: shows a bar on stderr.
        Raises TrainingDiverged.
        """
        segment, every = self.lesson.learn.segment, self.lesson.learn.checkpoint_every
        self.out.mkdir(parents=True, exist_ok=True)
        if not self.before:
            self.before = self._judge()
            self._save()  # or what is killed before the first checkpoint could not be resumed
        metrics = JsonLines(self.out / "metrics.jsonl", self.step)
        bar = tqdm(
            total=self.tokens,
            initial=self.position,
            unit="tok",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not progress,
        )
        nats, count = 0.0, 0  # of the current record
        with bar, StopSignals() as stop:
            while self.position < self.tokens and stop.received is None:
                start = time.perf_counter()
                stop_at = min(self.position + segment, self.tokens) + 1
                tokens = self.corpus.train[torch.arange(self.position, stop_at)].long()
                cost = self.learner.read(tokens)
                self.seconds += time.perf_counter() - start
                size = int(self.tokenizer.byte_counts[tokens[1:]].sum())
                nats, count = nats + cost, count + size
                self.nats, self.bytes = self.nats + cost, self.bytes + size
                read, self.position = len(tokens) - 1, self.position + len(tokens) - 1
                self.step += 1
                due = self.position // every > (self.position - read) // every
                if due or count >= _RECORD or self.position == self.tokens:
                    metrics.write(self._record(nats, count))
                    bar.set_postfix(bits=f"{nats / max(1, count) / math.log(2):.3f}", refresh=False)
                    nats, count = 0.0, 0
                if due and self.position < self.tokens:
                    metrics.flush()
                    self._save()
                bar.update(read)
        if count:
            metrics.write(self._record(nats, count))
        metrics.close()
        if self._saved_at != self.step:
            self._save()
        return self._finish(stop.received)

    def _record(self, nats: float, count: int) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.position,
            "train_bits_per_byte": nats / max(1, count) / math.log(2),
            "seconds": self.seconds,
        }

    def _judge(self) -> dict[str, float]:
        model, train, packed = self.learner.model.eval(), self.config.train, self.config.data.packed
        figures = {
            name: bits_per_byte(model, tokens, train, self.tokenizer, packed=packed)
            for name, tokens in (("new", self.corpus.validation), ("old", self.old))
        }
        model.train()
        return figures

    def _finish(self, received: signal.Signals | None) -> LearnResult:
        files = {"checkpoint": find_checkpoint(self.out), "metrics": self.out / "metrics.jsonl"}
        read = self.nats / self.bytes / math.log(2) if self.bytes else None
        after = None
        if received is None:
            after = self._judge()
            files["loss curve"], files["figures"] = self.out / "loss.png", self.out / FILE
            plot_loss(files["metrics"], files["loss curve"], f"{self.config.preset} learns")
            content = {
                "lesson": to_dict(self.lesson),
                "texts": self.descriptions,
                **provenance(self.learner.model.embedding.weight.device),
                "preset": self.config.preset,
                "parameters": sum(w.numel() for w in self.learner.model.parameters()),
                "learned_parameters": sum(w.numel() for w in self.learner.parameters),
                "tokens": self.position,
                "seconds": self.seconds,
                "bits_per_byte": {"before": self.before, "after": after, "while_reading": read},
            }
            with atomic_file(files["figures"]) as path:
                path.write_text(json.dumps(content, indent=1) + "\n")
        return LearnResult(self.before, after, read, self.position, self.seconds, received, files)

    def _save(self) -> None:
        """A checkpoint, complete or absent; older ones go as in a training."""
        state = {
            "text": self.corpus.fingerprint,
            "lesson": to_dict(self.lesson),
            "learner": self.learner.state_dict(),
            "before": self.before,
            **{name: getattr(self, name) for name in _COUNTS},
        }
        checkpoints = self.out / "checkpoints"
        path = checkpoints / f"step-{self.step:08d}"
        with named_errors(self.out, self.step), atomic_directory(path) as directory:
            weights = self.learner.model.state_dict()
            save_file({name: w.contiguous() for name, w in weights.items()}, directory / _WEIGHTS)
            for name, content in self._files.items():
                (directory / name).write_bytes(content)
            torch.save(state, directory / _LEARNER)
        for old in sorted(checkpoints.glob("step-*"))[: -self.config.train.keep_checkpoints]:
            shutil.rmtree(old)
        self._saved_at = self.step

    def _load_learner(self, source: Path, state: dict[str, Any]) -> None:
        try:
            self.learner.load_state_dict(state["learner"])
        except torch.OutOfMemoryError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            path = source / _LEARNER
            raise HopeError(f"{path} is not the state of this model's learner: {error}") from error

    def _resume(self, source: Path, state: dict[str, Any]) -> None:
        if state["text"] != self.corpus.fingerprint:
            raise HopeError(
                f"the text is not what the run in {self.out} began with; it cannot be resumed"
            )
        self._load_learner(source, state)
        self.before = state["before"]
        for name in _COUNTS:
            setattr(self, name, state[name])
        self._saved_at = self.step


def learned_state(checkpoint: Path) -> dict[str, Any] | None:
    """What `hope learn` has left in a checkpoint; None: it has not learned since its training."""
    path = checkpoint / _LEARNER
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise HopeError(f"cannot read the learner's state in {path}: {error}") from error
    needed = {"text", "lesson", "learner", "before", *_COUNTS}
    if not isinstance(state, dict) or set(state) != needed:
        raise HopeError(f"{path} is not a learner's state")
    return state


def load_lesson(path: Path) -> Lesson | None:
    """The lesson of a run or checkpoint of `hope learn`; None: it is another run's."""
    state = learned_state(find_checkpoint(path))
    return None if state is None else from_dict(Lesson, state["lesson"])


def check_goes_on(state: dict[str, Any], learn: LearnConfig) -> None:
    """HopeError where what is pending was accumulated under other settings."""
    saved = from_dict(Lesson, state["lesson"]).learn
    for name in _LASTING:
        before, now = getattr(saved, name), getattr(learn, name)
        if before != now:
            raise HopeError(
                f"{name} was {before} when this checkpoint learned, not {now}; --anew drops what "
                "it has pending"
            )


def _joined(first: Tokens, second: Tokens) -> Tokens:
    return first + second if isinstance(first, MappedTokens) else torch.cat((first, second))


def table(result: LearnResult) -> str:
    """Bits per byte before and after as aligned text."""
    lines = [f"{'bits per byte':<22}{'before':>10}{'after':>10}{'change':>10}"]
    for name in ("new", "old"):
        before, after = result.before[name], result.after[name]
        label = f"{name} text, held out"
        lines.append(f"{label:<22}{before:>10.4f}{after:>10.4f}{after - before:>+10.4f}")
    lines.append(f"{'new text, while read':<22}{result.read:>10.4f}")
    return "\n".join(lines)
