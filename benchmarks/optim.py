"""Trains two small problems with every optimizer of hope.optim and two of torch's.

    python -m benchmarks.optim

"regression" is convex and has a known optimum: a linear layer on noisy data; shown is how far its
loss is from the least one. "digits" is an MLP on scikit-learn's handwritten digits; shown is the
loss on those that it does not train on. Rates, one for each optimizer and problem, are the best of
a few and fall to zero with a cosine. Curves and results go into one JSON file and one picture, an
SVG. It shows that each trains, not which is best.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hope.optim import DGD, DMGD, M3, DeltaMomentum, MultiFrequency, Muon, PreconditionedMomentum
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import report, sources

Optimizers = list[torch.optim.Optimizer]
Make = Callable[[nn.Module, float], Optimizers]

# ---- problems ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Something to train.

    Attributes:
        model: makes it, the same every time.
        loss: of the model in step i.
        measure: what is shown of the model, after steps.
        steps: to be taken.
        quantity: what the measure is.
    """

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, int], Tensor]
    measure: Callable[[nn.Module], float]
    steps: int
    quantity: str


@dataclass(frozen=True)
class Regression:
    """64 noisy observations of a linear map of 8 numbers to 5."""

    x: Tensor
    y: Tensor

    @staticmethod
    def drawn() -> Regression:
        draw = torch.Generator().manual_seed(0)
        x, noise, true = (
            torch.randn(*size, generator=draw, dtype=torch.float64)
            for size in ((64, 8), (64, 5), (8, 5))
        )
        x *= torch.linspace(0.3, 1.5, 8)
        return Regression(x, x @ true + 1 + 0.1 * noise)

    def loss(self, model: nn.Module) -> Tensor:
        return 0.5 * (model(self.x) - self.y).square().sum(1).mean()

    def optimum(self) -> nn.Linear:
        """Of the loss, by a decomposition."""
        ones = torch.ones(len(self.x), 1, dtype=torch.float64)
        solution = torch.linalg.lstsq(torch.cat((self.x, ones), 1), self.y).solution
        return _linear(solution[:-1].mT, solution[-1])

    def optimum_of_dgd(self) -> nn.Linear:
        """Of the loss and 1/2 tr(W C W^T), C the mean of x x^T of inputs of length 1."""
        units, centered = F.normalize(self.x, dim=1), self.x - self.x.mean(0)
        w = torch.linalg.solve(centered.mT @ self.x + units.mT @ units, centered.mT @ self.y)
        return _linear(w.mT, self.y.mean(0) - self.x.mean(0) @ w)


def _linear(weight: Tensor | None = None, bias: Tensor | None = None) -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(8, 5).double()
    if weight is not None:
        model.load_state_dict({"weight": weight, "bias": bias})
    return model


def regression() -> Problem:
    data = Regression.drawn()
    with torch.no_grad():
        least = data.loss(data.optimum()).item()

    @torch.no_grad()
    def gap(model: nn.Module) -> float:
        return data.loss(model).item() - least

    return Problem(
        *("regression", _linear, lambda model, _: data.loss(model), gap, 300),
        "loss above the least",
    )


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))


def digits() -> Problem:
    """Raises ModuleNotFoundError where scikit-learn is not installed."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    images = images.float() / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held, rest = order[:360], order[360:]
    batch = 128

    def loss(model: nn.Module, step: int) -> Tensor:
        start = step * batch % (len(rest) - batch)
        chosen = rest[start : start + batch]
        return F.cross_entropy(model(images[chosen]), labels[chosen])

    @torch.no_grad()
    def held_out(model: nn.Module) -> float:
        model.accuracy = (model(images[held]).argmax(1) == labels[held]).float().mean().item()
        return F.cross_entropy(model(images[held]), labels[held]).item()

    return Problem("digits", _mlp, loss, held_out, 300, "loss on held-out digits")


PROBLEMS = {"regression": regression, "digits": digits}

# ---- optimizers ----------------------------------------------------------------------------------


def _alone(kind: type, **options: Any) -> Make:
    return lambda model, lr: [kind(model.parameters(), lr=lr, **options)]


def _muon(model: nn.Module, lr: float) -> Optimizers:
    """It is for matrices alone."""
    by_dimensions = [[p for p in model.parameters() if (p.dim() == 2) == two] for two in (1, 0)]
    matrices, vectors = by_dimensions
    return [Muon(matrices, lr=lr, weight_decay=0.0), torch.optim.Adam(vectors, lr=lr)]


def _two_frequencies(model: nn.Module, lr: float) -> Optimizers:
    """The first layer follows every fourth step."""
    first, *rest = model.parameters()
    groups = [{"params": [first], "period": 4}, {"params": rest}]
    return [MultiFrequency(groups, lr=lr, weight_decay=0.0)]


@dataclass(frozen=True)
class Contestant:
    """An optimizer and its rate in each problem."""

    make: Make
    rates: dict[str, float]


def _contestant(make: Make, regression: float, digits: float) -> Contestant:
    return Contestant(make, {"regression": regression, "digits": digits})


_DEEP = {"memory": "mlp", "alpha": 0.99, "eta": 0.1, "hidden": 32, "preconditioner": F.normalize}

CONTESTANTS = {
    "AdamW (torch)": _contestant(_alone(torch.optim.AdamW, weight_decay=0.0), 0.1, 0.03),
    "Muon (torch), with Adam": _contestant(_muon, 0.1, 0.03),
    "MultiFrequency": _contestant(_two_frequencies, 0.1, 0.03),
    "PreconditionedMomentum": _contestant(_alone(PreconditionedMomentum), 0.1, 0.3),
    "PreconditionedMomentum, diagonal": _contestant(
        _alone(PreconditionedMomentum, preconditioner="diagonal"), 0.03, 0.01
    ),
    "DeltaMomentum": _contestant(_alone(DeltaMomentum), 0.3, 1.0),
    "DMGD": _contestant(_alone(DMGD, eta=0.1), 1.0, 3.0),
    "DMGD, Newton-Schulz": _contestant(_alone(DMGD, sigma="newton_schulz"), 0.1, 0.1),
    "DMGD, deep": _contestant(_alone(DMGD, **_DEEP), 0.3, 1.0),
    "DMGD, deep, Newton-Schulz": _contestant(
        _alone(DMGD, sigma="newton_schulz", **_DEEP), 0.1, 0.1
    ),
    "DGD": _contestant(lambda model, lr: [DGD(model.parameters(), model, lr=lr)], 1.0, 1.0),
    "M3": _contestant(_alone(M3, eps=0.01), 0.1, 0.001),
    "M3, printed": _contestant(_alone(M3, form="printed", eps=0.01), 0.3, 0.003),
}


@dataclass(frozen=True)
class Run:
    """A training that is over: the measure after steps (step, measure), and the model."""

    rate: float
    curve: list[tuple[int, float]]
    model: nn.Module

    @property
    def facts(self) -> dict[str, Any]:
        facts = {"rate": self.rate, "first": self.curve[0][1], "last": self.curve[-1][1]}
        accuracy = getattr(self.model, "accuracy", None)
        return facts if accuracy is None else {**facts, "accuracy": accuracy}


def train(problem: Problem, contestant: Contestant, every: int = 10) -> Run:
    """Trains a fresh model, which is measured once in a while."""
    model, rate = problem.model(), contestant.rates[problem.name]
    optimizers = contestant.make(model, rate)
    schedulers = [
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, problem.steps)
        for optimizer in optimizers
    ]
    curve = [(0, problem.measure(model))]
    for step in range(problem.steps):
        model.zero_grad()
        problem.loss(model, step).backward()
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        if (step + 1) % every == 0:
            curve.append((step + 1, problem.measure(model)))
    return Run(rate, curve, model)


# ---- the command ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, prints a table, writes the results; returns 0."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.optim",
        description="Trains two small problems with every optimizer of hope.optim.",
    )
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--steps", type=report.positive, help="default: the problem's")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIRECTORY",
        default=sources.RESULTS,
        help="where JSON and picture go (default: benchmarks/results)",
    )
    options = parser.parse_args(words)
    torch.set_num_threads(1)  # so small that threads would wait for each other
    problems = [PROBLEMS[name]() for name in options.problems]
    if options.steps is not None:
        problems = [replace(problem, steps=options.steps) for problem in problems]
    runs: dict[str, dict[str, Run]] = {}
    for problem in problems:
        runs[problem.name] = {}
        for name, contestant in CONTESTANTS.items():
            run = runs[problem.name][name] = train(problem, contestant)
            facts = ", ".join(f"{key} {value:.3g}" for key, value in run.facts.items())
            print(f"{problem.name}  {name}: {facts}", flush=True)
    result = {
        "benchmark": "optim",
        "command": shlex.join(["python", "-m", "benchmarks.optim", *words]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": report.environment("cpu"),
        "problems": {
            problem.name: {
                "quantity": problem.quantity,
                "steps": problem.steps,
                "runs": {
                    name: {**run.facts, "curve": run.curve}
                    for name, run in runs[problem.name].items()
                },
            }
            for problem in problems
        },
    }
    path = sources.dated(options.out, "optim-cpu")
    sources.write_json(path.with_suffix(".json"), result)
    plot(problems, runs, path.with_suffix(".svg"))
    print(path.with_suffix(".json"), path.with_suffix(".svg"), sep="\n")
    return 0


def plot(problems: Sequence[Problem], runs: dict[str, dict[str, Run]], picture: Path) -> None:
    """Draws the curves as an SVG, one panel for each problem."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(problems) + 3, 5), layout="constrained")
    panels = figure.subplots(1, len(problems), squeeze=False)[0]
    for axes, problem in zip(panels, problems, strict=True):
        for index, (name, run) in enumerate(runs[problem.name].items()):
            steps, values = zip(*run.curve, strict=True)
            style = "--" if "torch" in name else "-"
            shown = [max(value, 1e-12) for value in values]  # a difference may round below 0
            axes.semilogy(
                steps,
                shown,
                style,
                color=f"C{index % 10}",
                linewidth=1.2,
                label=name,
                marker="." if index >= 10 else None,
                markersize=4,
            )
        axes.set(xlabel="steps", ylabel=problem.quantity, title=problem.name)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hope"}):
        figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
