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


def plot_speeds(rows: Sequence[dict[str, Any]], speed: str, picture: Path) -> None:
    """Draws tokens a second over the length of the text, a line for each preset, as a PNG.

    rows: with "preset", "tokens" and, where it was timed, `speed`.
    """
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    for name in dict.fromkeys(row["preset"] for row in rows):
        points = sorted((r["tokens"], r[speed]) for r in rows if r["preset"] == name and speed in r)
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    axes.set(xlabel="tokens of the text", ylabel=speed.replace("_", " "), yscale="log")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    _save(figure, picture)


def plot_matrices(results: Sequence[dict[str, Any]], domains: Sequence[str], picture: Path) -> None:
    """Draws what each domain's held-out text costs while they are learned in sequence, as a PNG.

    results: of `hope.continual.ContinualEvaluation`; a panel each, with what has been learned last
    from left to right. At a domain's dot it has just been learned: what rises after is forgotten.
    """
    columns = min(4, len(results))
    rows = -(-len(results) // columns)
    figure = _figure(4 * columns, 4 * rows)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    stages = range(len(domains))
    for axes, result in zip(panels, results, strict=False):
        for j, name in enumerate(domains):
            losses = [row[j] for row in result["bits_per_byte"]]
            axes.plot(stages, losses, color=f"C{j}", label=name)
            axes.plot(j, losses[j], color=f"C{j}", marker="o")
        axes.set_title(result["name"], fontsize="medium")
        axes.set_xticks(stages, domains, rotation=20)
        axes.grid(alpha=0.3)
    for axes in panels[len(results) :]:
        axes.remove()
    for axes in panels[::columns]:
        axes.set(ylabel="bits per byte, held out")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=8)
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
