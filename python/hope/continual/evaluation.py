"""Models that learn kinds of text one after the other, and what they still know of the first.

An evaluation is a directory: a training run for each model, `continual.json` (what was asked for
and, of every model that is done, its matrix and figures) and `continual.png`. One that was stopped
goes on in the training that it was in, or with the first model that is not done.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hope.checkpoint import has_checkpoint, load_model
from hope.compare import comparable
from hope.config import LearnConfig, RunConfig, from_dict, to_dict
from hope.continual.domains import DOMAINS, Domain, make_domain
from hope.continual.learner import Learner
from hope.continual.transfer import FIGURES, figures
from hope.data import SEPARATOR, Corpus
from hope.device import check_sizes
from hope.errors import HopeError
from hope.files import atomic_file
from hope.model import parameter_count
from hope.plot import plot_matrices
from hope.provenance import provenance
from hope.train import Trainer, TrainResult, bits_per_byte, discard

FILE, PICTURE = "continual.json", "continual.png"


@dataclass(frozen=True)
class Pupil:
    """A model of the evaluation: how it is trained on the first domain, how it learns the others.

    name: of its row, such as the preset's.
    """

    name: str
    run: RunConfig
    learn: LearnConfig


@dataclass(frozen=True)
class Curriculum:
    """Domains in their order, and how many tokens there are of each.

    first: of domain 0, which is trained on. tokens: of each later one, read once. held_out: of
    every domain, to be judged by.
    """

    domains: tuple[str, ...] = tuple(DOMAINS)
    first: int = 600_000
    tokens: int = 30_000
    held_out: int = 8_192
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.domains) < 2 or len(set(self.domains)) < len(self.domains):
            got = ", ".join(self.domains) or "none"
            raise HopeError(f"domains must be two or more that differ, not {got}")

    def make(self) -> list[Domain]:
        sizes = [self.first] + [self.tokens] * (len(self.domains) - 1)
        return [
            make_domain(name, size + 1, self.held_out + 1, self.seed)
            for name, size in zip(self.domains, sizes, strict=True)
        ]


class ContinualEvaluation:
    """Trains `pupils` on the first domain and lets them learn the others, below `out`.

    resume: pupils that `out` has figures of are not taught again, and a training that was stopped
    goes on. Raises HopeError where `out` has files without it, or what is there was asked for in
    another way, and where pupils would train on different batches.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        pupils: Sequence[Pupil],
        out: Path,
        device: str | torch.device = "cpu",
        *,
        resume: bool = False,
    ) -> None:
        names = [pupil.name for pupil in pupils]
        if twice := [name for name in names if names.count(name) > 1]:
            raise HopeError(f"{twice[0]!r} is named twice; an evaluation's models must differ")
        by_preset = list({pupil.run.preset: pupil.run for pupil in pupils}.values())
        if len(by_preset) > 1:
            comparable(by_preset)
        self.curriculum, self.pupils, self.out, self.device = curriculum, pupils, out, device
        self.results: list[dict[str, Any]] = []
        for pupil in pupils:
            check_sizes(pupil.run.model, device)
        if resume:
            saved = _load(out)
            asked = json.loads(json.dumps(self._asked()))
            if {name: saved.get(name) for name in asked} != asked:
                raise HopeError(
                    f"{out} is an evaluation with other settings; a resumed one keeps them"
                )
            self.results = saved["results"]
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise HopeError(
                f"{out} is not empty; continue that evaluation with --resume, or choose another "
                "--out"
            )

    def run(self, *, progress: bool = True) -> TrainResult | None:
        """Goes on to the end: None; or the result of the training that a signal stopped.

        progress: says which model it is, and shows bars on stderr. A KeyboardInterrupt loses what
        the pupil has learned since its training. Raises TrainingDiverged.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self._write()
        domains = self.curriculum.make()
        for number, pupil in enumerate(self.pupils[len(self.results) :], len(self.results) + 1):
            if progress:
                print(f"model  {number} of {len(self.pupils)}: {pupil.name}", flush=True)
            result = self._train(pupil.run, domains[0], progress)
            if result.signal is not None:
                return result
            self.results.append(
                {
                    "name": pupil.name,
                    "parameters": parameter_count(pupil.run.model),
                    "training_seconds": result.seconds,
                    **self._teach(pupil, domains, progress),
                }
            )
            self._write()
        plot_matrices(self.results, self.curriculum.domains, self.out / PICTURE)
        return None

    def _train(self, config: RunConfig, domain: Domain, progress: bool) -> TrainResult:
        """Pupils of one preset share its training."""
        run = self.out / config.preset
        resume = has_checkpoint(run)
        if not resume:  # what a run leaves that was killed before its first checkpoint
            discard(run)
        corpus = Corpus(domain.train, domain.held_out, f"domain {domain.name}")
        return Trainer(config, corpus, run, self.device, resume=resume).run(progress=progress)

    def _teach(self, pupil: Pupil, domains: Sequence[Domain], progress: bool) -> dict[str, Any]:
        """The matrix of losses, what each text cost while it was read, and the seconds."""
        model = load_model(self.out / pupil.run.preset, self.device)
        learner = Learner(model, pupil.run, pupil.learn)
        losses, read, start = [_judge(learner, domains)], [], time.perf_counter()
        for domain in domains[1:]:
            read.append(_read(learner, domain, pupil.name if progress else None))
            losses.append(_judge(learner, domains))
        return {
            "learned_parameters": sum(w.numel() for w in learner.parameters),
            "learning_seconds": time.perf_counter() - start,
            "bits_per_byte": losses,
            "while_reading": read,
            **figures(losses),
        }

    def _asked(self) -> dict[str, Any]:
        return {
            "curriculum": to_dict(self.curriculum),
            "pupils": [to_dict(pupil) for pupil in self.pupils],
        }

    def _write(self) -> None:
        content = {
            **self._asked(),
            **provenance(self.device),
            "results": self.results,
            "table": table(self.results, self.curriculum.domains).splitlines(),
        }
        with atomic_file(self.out / FILE) as path:
            path.write_text(json.dumps(content, indent=1) + "\n")


def load_continual(out: Path) -> tuple[Curriculum, list[Pupil]]:
    """What the evaluation in `out` was asked for."""
    saved = _load(out)
    pupils = [from_dict(Pupil, pupil) for pupil in saved["pupils"]]
    return from_dict(Curriculum, saved["curriculum"]), pupils


def _load(out: Path) -> dict[str, Any]:
    path = out / FILE
    if not path.is_file():
        raise HopeError(f"there is no evaluation in {out}: {path} is missing")
    try:
        content = json.loads(path.read_text())
        return {name: content[name] for name in ("curriculum", "pupils", "results")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise HopeError(f"cannot read {path}: {error}") from error


def _judge(learner: Learner, domains: Sequence[Domain]) -> list[float]:
    """Bits per byte of every domain's held-out text, in windows as long as the training's."""
    model, train = learner.model.eval(), learner.run.train
    losses = [bits_per_byte(model, domain.held_out, train) for domain in domains]
    model.train()
    return losses


def _read(learner: Learner, domain: Domain, name: str | None) -> float:
    """Reads and learns a domain's text from a fresh state; the bits per byte that it cost."""
    segment, nats = learner.config.segment, 0.0
    learner.restart()
    starts = range(0, len(domain.train) - 1, segment)
    for start in tqdm(starts, f"{name}, {domain.name}", dynamic_ncols=True, disable=name is None):
        nats += learner.read(domain.train[start : start + segment + 1])
    return nats / int((domain.train[1:] != SEPARATOR).sum()) / math.log(2)


def table(results: Sequence[dict[str, Any]], domains: Sequence[str]) -> str:
    """Each model's matrix, a line for every domain that was learned, then a line of figures each.

    Aligned text.
    """
    rows = [("bits per byte of", "parameters", *domains)]
    for result in results:
        for i, losses in enumerate(result["bits_per_byte"]):
            name, size = (result["name"], f"{result['parameters']:,}") if i == 0 else ("", "")
            what = "trained on" if i == 0 else "then"
            rows.append((name, size, *(f"{x:.3f}" for x in losses), f"{what} {domains[i]}"))
    rows[0] = (*rows[0], "")
    rows.append(("",) * len(rows[0]))
    summary = [("", *(name.replace("_", " ") for name in FIGURES))]
    summary += [(r["name"], *(f"{r[name]:.3f}" for name in FIGURES)) for r in results]
    return f"{_aligned(rows)}{_aligned(summary)}".rstrip()


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join(
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        + "\n"
        for row in rows
    )
