"""The loss curves of runs as pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hope.files import atomic_file


def plot_loss(metrics: Path, picture: Path, title: str) -> None:
    """Draws the training and validation losses of a `metrics.jsonl` over tokens as a PNG."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    for key, label, style in (
        ("train_bits_per_byte", "training", {"linewidth": 0.8}),
        ("validation_bits_per_byte", "validation", {"marker": "o", "markersize": 4}),
    ):
        points = [(record["tokens"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="tokens", ylabel="bits per byte", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, picture)


def plot_runs(runs: Sequence[dict[str, Any]], picture: Path) -> None:
    """Draws runs (`hope.compare.figures`) over tokens, and over seconds of training, as a PNG."""
    figure = _figure(12, 5)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, over in zip(panels, ("tokens", "seconds"), strict=True):
        for index, run in enumerate(runs):
            color = f"C{index}"
            training, validation = run["training"], run["validation"]
            axes.plot(
                training[over], training["bits_per_byte"], color=color, linewidth=0.5, alpha=0.4
            )
            axes.plot(
                validation[over],
                validation["bits_per_byte"],
                color=color,
                marker="o",
                markersize=4,
                label=f"{run['preset']}, {run['parameters'] / 1e6:.2f} M parameters",
            )
        axes.set(xlabel=f"{over} of training")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="bits per byte (line with dots: validation)")
    panels[0].legend()
    _save(figure, picture)


def plot_bands(runs: Sequence[dict[str, Any]], picture: Path) -> None:
    """Draws the validation losses of runs (`hope.compare.figures`) over tokens as a PNG.

    Runs of one preset, which differ in their seeds, are one line of means in a band from the lowest
    to the highest.
    """
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    for index, name in enumerate(dict.fromkeys(run["preset"] for run in runs)):
        curves = [run["validation"] for run in runs if run["preset"] == name]
        points = list(zip(*(curve["bits_per_byte"] for curve in curves), strict=True))
        tokens, color = curves[0]["tokens"], f"C{index}"
        means = [sum(values) / len(values) for values in points]
        axes.plot(tokens, means, color=color, marker="o", markersize=3, label=name)
        axes.fill_between(
            tokens, [*map(min, points)], [*map(max, points)], color=color, alpha=0.2, linewidth=0
        )
    axes.set(xlabel="tokens of training", ylabel="bits per byte of the validation text")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, picture)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, needed only here
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, picture: Path) -> None:
    with atomic_file(picture) as path:
        figure.savefig(path)
