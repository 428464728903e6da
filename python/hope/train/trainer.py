"""Training a language model on a token budget, so that it can be stopped and resumed at any step.

A run is a directory: `checkpoints/`, `metrics.jsonl` (one JSON object per step and validation),
`loss.png`, `sample.txt` (docs/training.md).
"""

import contextlib
import math
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hope.checkpoint import (
    find_checkpoint,
    has_checkpoint,
    load_model,
    load_state,
    save_checkpoint,
)
from hope.config import RunConfig
from hope.data import Batch, Corpus, training_sampler
from hope.device import check_sizes
from hope.errors import HopeError
from hope.files import atomic_file
from hope.generate import decode, generate
from hope.model import LanguageModel
from hope.plot import plot_loss
from hope.train.divergence import TrainingDiverged, bad_parameter, first_bad_tensor
from hope.train.metrics import FILE, Metrics, check_packages, remove_metrics
from hope.train.optimizer import make_optimizer
from hope.train.ranks import join
from hope.train.schedule import learning_rate
from hope.train.signals import StopSignals
from hope.train.validation import LN2, autocast, bits_per_byte, target_bytes, target_count


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. signal: what stopped it early (then there is no sample)."""

    validation_bits_per_byte: float | None
    tokens: int
    seconds: float
    sample: str | None
    signal: signal.Signals | None
    files: dict[str, Path]


def discard(run: Path) -> None:
    """Removes what a run leaves that was killed before its first checkpoint.

    Raises HopeError where it has one.
    """
    if has_checkpoint(run):
        raise HopeError(f"{run} has a checkpoint; continue it, or remove the directory")
    remove_metrics(run)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)


class Trainer:
    """Trains `config.model` on `corpus` in the directory `out`.

    resume: continue from the newest checkpoint in `out`, exactly where it was left (on the same
    device and number of threads the losses are bitwise those of an uninterrupted run). Otherwise
    `out` must be new or empty. Raises HopeError where that is not so, or where the corpus is not
    the one that the run began with.

    In a process group, all of its ranks make a Trainer, and do the same with it: together they
    train as one process would, up to rounding, in the way of `config.parallel` (docs/scale.md). The
    first one writes the files.
    """

    def __init__(
        self,
        config: RunConfig,
        corpus: Corpus,
        out: Path,
        device: str | torch.device = "cpu",
        *,
        resume: bool = False,
    ) -> None:
        self.config, self.corpus, self.out = config, corpus, out
        self.device = torch.device(device)
        needed, got = corpus.tokenizer.vocab_size, config.model.vocab_size
        if got < needed:
            raise HopeError(
                f"model.vocab_size must be at least {needed} for {corpus.tokenizer.name}, not {got}"
            )
        checkpoint = find_checkpoint(out) if resume else None
        if checkpoint is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
            way = "continue that run with --resume"
            if not has_checkpoint(out):
                way = "there is no checkpoint to continue from, so remove it"
            raise HopeError(f"{out} is not empty; {way}, or choose another --out")
        check_packages(config)
        check_sizes(config.model, self.device)
        train = config.train
        self.ranks = join(config, self.device)
        self.ranks.wait()  # or one would find in `out` what another has begun to write
        torch.manual_seed(train.seed)
        self.model = LanguageModel(config.model).to(self.device)
        self.model.checkpoint_activations = train.checkpoint_activations
        self.loss = self.ranks.spread(self.model, train.compile)
        self.optimizer = make_optimizer(self.model, train)
        rank, world = self.ranks.data_rank, self.ranks.data
        self.sampler = training_sampler(
            corpus, train, packed=config.data.packed, rank=rank, world=world
        )
        self.step, self.seconds = 0, 0.0
        self.validation: float | None = None
        self._saved: Path | None = None  # the newest checkpoint
        if checkpoint is not None:
            self._load(checkpoint)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.config.train.tokens_per_step

    def run(self, *, progress: bool = True) -> TrainResult:
        """Trains to the end of the budget, or until SIGINT or SIGTERM: then it finishes the step.

        It ends with a checkpoint in both cases. progress: shows a bar on stderr.
        Raises TrainingDiverged.
        """
        train = self.config.train
        self.out.mkdir(parents=True, exist_ok=True)
        metrics = Metrics(self.config, self.out, self.step if self.ranks.first else None)
        bar = tqdm(
            total=train.steps * train.tokens_per_step,
            initial=self.tokens,
            unit="tok",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not (progress and self.ranks.first),
        )
        self.model.train()
        received = None
        with bar, contextlib.closing(metrics), StopSignals(self.ranks.grace) as stop:
            while self.step < train.steps:
                received = self.ranks.stopped(stop.received)
                if received is not None:
                    break
                record = self._train_step()
                metrics.write(record)
                if self.step % train.validate_every == 0 or self.step == train.steps:
                    self.validation = self._validate()
                    validation = {"validation_bits_per_byte": self.validation}
                    metrics.write({"step": self.step, "tokens": self.tokens, **validation})
                if self.step % train.checkpoint_every == 0 or self.step == train.steps:
                    self._save(metrics)
                shown = {"loss": f"{record['train_bits_per_byte']:.3f}"}
                if self.validation is not None:
                    shown["validation"] = f"{self.validation:.3f}"
                bar.set_postfix(shown, refresh=False)
                bar.update(train.tokens_per_step)
            if self.step > 0 and not self._is_saved():
                self._save(metrics)
        return self._finish(received)

    def _train_step(self) -> dict[str, Any]:
        """One optimizer step; returns its metrics."""
        train, start = self.config.train, time.perf_counter()
        rate = learning_rate(train, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batches = self._take_batches()
        loss = self.ranks.mean(self._backward(batches, self.loss))
        norm = self.ranks.clip(self.model, train.clip)
        # Of the text in the batch: a separator costs nats, too, but is no byte.
        count = sum(target_bytes(batch, self.corpus.tokenizer) for batch in batches)
        tokens, count = self.ranks.sum(sum(map(target_count, batches)), count)
        bits = loss.item() * tokens / max(1, count) / LN2
        values = {"train_bits_per_byte": bits, "gradient_norm": norm.item()}
        if not all(math.isfinite(value) for value in values.values()):
            where = self.ranks.first_of(bad_parameter(self.model))
            if where is None:
                found = first_bad_tensor(self.model, lambda loss: self._backward(batches, loss))
                where = self.ranks.first_of(found)
            named = {name.replace("_", " "): value for name, value in values.items()}
            numbers = ", ".join(f"{name} {value}" for name, value in named.items())
            raise self._diverged(f"step {self.step + 1} ({numbers}, lr {rate:.2e})", where)
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - start
        self.step += 1
        self.seconds += seconds
        return {
            "step": self.step,
            "tokens": self.tokens,
            **values,
            "lr": rate,
            "tokens_per_second": train.tokens_per_step / seconds,
            "seconds": self.seconds,
        }

    def _take_batches(self) -> list[Batch]:
        """The parts of a step's batch: the one place that knows the sampler."""
        parts = range(self.config.train.accumulate)
        return [self.ranks.part(self.sampler.next_batch()) for _ in parts]

    def _backward(self, batches: Sequence[Batch], loss_of: Callable[..., Tensor]) -> Tensor:
        """Adds the gradient of the mean loss of all targets to the parameters'; that loss.

        On a grid each rank returns another number. Their mean is that loss, as the gradient is the
        mean of the ranks'.
        """
        counts = [target_count(batch) for batch in batches]
        (whole,) = self.ranks.sum(sum(counts))
        total = torch.zeros((), device=self.device)
        for number, (batch, count) in enumerate(zip(batches, counts, strict=True), 1):
            with self.ranks.alone(last=number == len(batches)):
                with autocast(self.device, self.config.train):
                    share = count * self.ranks.parts / whole
                    loss = loss_of(*batch.to(self.device)) * share
                loss.backward()
            total += loss.detach()
        return total

    def _diverged(self, when: str, where: str | None) -> TrainingDiverged:
        if where is None:
            where = "none was found when the step was computed again, without torch.compile"
        if self._saved is None:
            left = "no checkpoint was written yet"
        else:
            left = f"the newest checkpoint is from before, and good: {self._saved}"
        return TrainingDiverged(
            f"training diverged at {when}. The first tensor that is not finite: {where}; {left}. "
            "A lower train.lr or train.clip, or a longer train.warmup, usually helps"
        )

    def _validate(self) -> float:
        self.model.eval()
        corpus, packed = self.corpus, self.config.data.packed
        value = bits_per_byte(
            self.model,
            corpus.validation,
            self.config.train,
            corpus.tokenizer,
            packed=packed,
            ranks=self.ranks,
        )
        self.model.train()
        if not math.isfinite(value):
            when = f"the validation after step {self.step} (validation bits per byte {value})"
            bad = self.ranks.first_of(bad_parameter(self.model))
            raise self._diverged(when, bad or "not a parameter, so it came up on the way")
        return value

    def _state(self) -> dict[str, Any]:
        """What a run goes on from, besides the weights and the optimizer."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "validation": self.validation,
            "corpus": self.corpus.fingerprint,
            "sampler": self.sampler.state_dict(),
            "random": torch.get_rng_state(),
        }

    def _is_saved(self) -> bool:
        return self._saved is not None and self._saved.name == f"step-{self.step:08d}"

    def _save(self, metrics: Metrics) -> None:
        """Writes a checkpoint, which is always one to go on from: its weights are finite."""
        if bad := self.ranks.first_of(bad_parameter(self.model)):
            raise self._diverged(f"the update of step {self.step}", bad)
        metrics.flush()
        self._saved = save_checkpoint(
            self.out,
            self.step,
            self.config,
            self.model,
            self.optimizer,
            self._state(),
            self.config.train.keep_checkpoints,
            self.corpus.tokenizer,
        )

    def _load(self, checkpoint: Path) -> None:
        state = load_state(checkpoint, self.model, self.optimizer, self._state())
        if state["corpus"] != self.corpus.fingerprint:
            raise HopeError(
                f"the data is not what the run in {self.out} began with; it cannot be resumed"
            )
        self.sampler.load_state_dict(state["sampler"])
        torch.set_rng_state(state["random"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.validation, self._saved = state["validation"], checkpoint

    def _finish(self, received: signal.Signals | None) -> TrainResult:
        files = {"metrics": self.out / FILE}
        if not self.ranks.first:
            return TrainResult(self.validation, self.tokens, self.seconds, None, received, files)
        if self.step > 0:
            files["checkpoint"] = find_checkpoint(self.out)
            files["loss curve"] = self.out / "loss.png"
            plot_loss(files["metrics"], files["loss curve"], self.config.preset)
        sample = None
        if received is None:
            model = self.model.eval() if self.ranks.whole else load_model(self.out, self.device)
            seed, tokenizer = self.config.train.seed, self.corpus.tokenizer
            sample = "".join(decode(generate(model, seed=seed, tokenizer=tokenizer), tokenizer))
            files["sample"] = self.out / "sample.txt"
            with atomic_file(files["sample"]) as path:
                path.write_text(sample)
        return TrainResult(self.validation, self.tokens, self.seconds, sample, received, files)
