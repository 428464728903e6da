"""Training a language model on a token budget, so that it can be stopped and resumed at any step.

A run is a directory: `checkpoints/`, `metrics.jsonl` (one JSON object per step and validation),
`loss.png`, `sample.txt`.
"""

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from hope.checkpoint import find_checkpoint, load_trainer, load_weights, save_checkpoint
from hope.config import RunConfig, TrainConfig
from hope.data import IGNORED, Batch, Corpus, Tokens, training_sampler, validation_batches
from hope.errors import HopeError
from hope.files import atomic_file
from hope.generate import decode, generate
from hope.layers import ContinuumMemory
from hope.model import LanguageModel
from hope.optim import MultiFrequency
from hope.plot import plot_loss
from hope.tokenizers import BYTES, Tokenizer

_LN2 = math.log(2)


class TrainingDiverged(RuntimeError):
    """The loss or its gradient became NaN or infinite; the message says where, and what is left."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. signal: what stopped it early (then there is no sample)."""

    validation_bits_per_byte: float | None
    tokens: int
    seconds: float
    sample: str | None
    signal: signal.Signals | None
    files: dict[str, Path]


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step 0, 1, ...: a linear warm-up, then cosine or linear down to lr * lr_final."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    height = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.lr_final + (1 - config.lr_final) * height)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay on the matrices of linear layers and embeddings only.

    With `config.level_periods` the MLPs of continuum memory systems are groups of their own, which
    move by what they have accumulated once in their period; all else moves in every step.
    """
    matrices = {
        module.weight for module in model.modules() if isinstance(module, (nn.Linear, nn.Embedding))
    }
    period_of = {
        parameter: period
        for memory in model.modules()
        if isinstance(memory, ContinuumMemory) and config.level_periods
        for level, period in zip(memory.levels, config.level_periods, strict=True)
        for parameter in level.parameters()
    }
    groups = []
    for period in sorted({1, *period_of.values()}):
        members = [p for p in model.parameters() if period_of.get(p, 1) == period]
        groups += [
            {"params": [p for p in members if p in matrices], "weight_decay": config.weight_decay},
            {"params": [p for p in members if p not in matrices], "weight_decay": 0.0},
        ]
        if config.level_periods:
            groups[-2]["period"] = groups[-1]["period"] = period
    options = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.level_periods:
        return MultiFrequency(groups, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


@torch.no_grad()
def bits_per_byte(
    model: LanguageModel,
    tokens: Tokens,
    config: TrainConfig,
    tokenizer: Tokenizer = BYTES,
    *,
    packed: bool = False,
) -> float:
    """The mean code length of a byte under the model, over fixed windows read from a fresh state.

    A document's end has to be coded too: its nats count, while only bytes are divided by.
    """
    device = model.embedding.weight.device
    nats, count = 0.0, 0
    batches = validation_batches(
        tokens,
        config.sequence,
        config.batch,
        config.validation_tokens,
        packed=packed,
        separator=tokenizer.separator,
    )
    for batch in batches:
        inputs, targets, cu_seqlens = batch.to(device)
        with autocast(device, config):
            logits = model(inputs, cu_seqlens=cu_seqlens)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        nats += loss.item()
        count += target_bytes(batch, tokenizer)
    return nats / count / _LN2


def target_bytes(batch: Batch, tokenizer: Tokenizer) -> int:
    """How many bytes of text the targets of a batch (on the CPU) are."""
    targets = batch.targets[batch.targets != IGNORED]
    return int(tokenizer.byte_counts[targets].sum())


def autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    """The context in which activations have the config's dtype."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")


class Trainer:
    """Trains `config.model` on `corpus` in the directory `out`.

    resume: continue from the newest checkpoint in `out`, exactly where it was left (on the same
    device and number of threads the losses are bitwise those of an uninterrupted run). Otherwise
    `out` must be new or empty. Raises HopeError where that is not so, or where the corpus is not
    the one that the run began with.
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
            raise HopeError(
                f"{out} is not empty; continue that run with --resume, or choose another --out"
            )
        train = config.train
        torch.manual_seed(train.seed)
        self.model = LanguageModel(config.model).to(self.device)
        self.loss = torch.compile(self.model.loss) if train.compile else self.model.loss
        self.optimizer = make_optimizer(self.model, train)
        self.sampler = training_sampler(corpus, train, packed=config.data.packed)
        self.step, self.seconds = 0, 0.0
        self.validation: float | None = None
        self.metrics = out / "metrics.jsonl"
        self._saved_at: int | None = None
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
        bar = tqdm(
            total=train.steps * train.tokens_per_step,
            initial=self.tokens,
            unit="tok",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not progress,
        )
        self.model.train()
        with bar, self.metrics.open("a", buffering=1) as metrics, _StopSignals() as stop:
            while self.step < train.steps and stop.received is None:
                record = self._train_step()
                metrics.write(json.dumps(record) + "\n")
                if self.step % train.validate_every == 0 or self.step == train.steps:
                    self.validation = self._validate()
                    validation = {"validation_bits_per_byte": self.validation}
                    metrics.write(
                        json.dumps({"step": self.step, "tokens": self.tokens, **validation}) + "\n"
                    )
                if self.step % train.checkpoint_every == 0 or self.step == train.steps:
                    self._save()
                shown = {"loss": f"{record['train_bits_per_byte']:.3f}"}
                if self.validation is not None:
                    shown["validation"] = f"{self.validation:.3f}"
                bar.set_postfix(shown, refresh=False)
                bar.update(train.tokens_per_step)
            if self.step > 0 and self._saved_at != self.step:
                self._save()
        return self._finish(stop.received)

    def _train_step(self) -> dict[str, Any]:
        """One optimizer step; returns its metrics."""
        train, start = self.config.train, time.perf_counter()
        rate = learning_rate(train, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.sampler.next_batch()
        with autocast(self.device, train):
            loss = self.loss(*batch.to(self.device))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), train.clip)
        # Of the text in the batch: a separator costs nats, too, but is no byte.
        tokens = int((batch.targets != IGNORED).sum())
        nats = loss.item() * tokens / max(1, target_bytes(batch, self.corpus.tokenizer))
        values = {"train_bits_per_byte": nats / _LN2, "gradient_norm": norm.item()}
        if not all(math.isfinite(value) for value in values.values()):
            raise TrainingDiverged(self._divergence(values, rate))
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

    def _divergence(self, values: dict[str, float], rate: float) -> str:
        what = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
        if self._saved_at is None:
            left = "no checkpoint was written yet"
        else:
            left = f"the newest checkpoint, of step {self._saved_at}, is from before"
        return (
            f"training diverged at step {self.step + 1} ({what}, learning rate {rate:.2e}); "
            f"{left}. A lower train.lr or train.clip, or a longer train.warmup, usually helps"
        )

    def _validate(self) -> float:
        self.model.eval()
        corpus, packed = self.corpus, self.config.data.packed
        value = bits_per_byte(
            self.model, corpus.validation, self.config.train, corpus.tokenizer, packed=packed
        )
        self.model.train()
        return value

    def _save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "validation": self.validation,
            "corpus": self.corpus.fingerprint,
            "sampler": self.sampler.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        keep = self.config.train.keep_checkpoints
        tokenizer = self.corpus.tokenizer
        save_checkpoint(self.out, self.step, self.config, self.model, state, keep, tokenizer)
        self._saved_at = self.step

    def _load(self, checkpoint: Path) -> None:
        state = load_trainer(checkpoint)
        if state["corpus"] != self.corpus.fingerprint:
            raise HopeError(
                f"the data is not what the run in {self.out} began with; it cannot be resumed"
            )
        load_weights(self.model, checkpoint)
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        torch.set_rng_state(state["random"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.validation, self._saved_at = state["validation"], state["step"]
        # What a killed run wrote after its last checkpoint will be written again.
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        with atomic_file(self.metrics) as path:
            path.write_text("".join(line + "\n" for line in lines if _step_of(line) <= self.step))

    def _finish(self, received: signal.Signals | None) -> TrainResult:
        files = {"metrics": self.metrics}
        if self.step > 0:
            files["checkpoint"] = find_checkpoint(self.out)
            files["loss curve"] = self.out / "loss.png"
            plot_loss(self.metrics, files["loss curve"], self.config.preset)
        sample = None
        if received is None:
            self.model.eval()
            seed, tokenizer = self.config.train.seed, self.corpus.tokenizer
            sample = "".join(
                decode(generate(self.model, seed=seed, tokenizer=tokenizer), tokenizer)
            )
            files["sample"] = self.out / "sample.txt"
            with atomic_file(files["sample"]) as path:
                path.write_text(sample)
        return TrainResult(self.validation, self.tokens, self.seconds, sample, received, files)


def _step_of(line: str) -> float:
    """The step of a metrics line; of one that a kill cut short, infinity."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf


class _StopSignals:
    """While open, a first SIGINT or SIGTERM is only noted; a second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "_StopSignals":
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._stack.enter_context(_handler(number, self._note))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        # print is not safe in a handler: it may have interrupted another print.
        os.write(2, b"\nstopping after this step, with a checkpoint (again: at once, without)\n")


@contextlib.contextmanager
def _handler(number: signal.Signals, handle: Any) -> Iterator[None]:
    previous = signal.signal(number, handle)
    try:
        yield
    finally:
        signal.signal(number, previous)
