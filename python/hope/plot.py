"""The loss curve of a run as a picture."""

import json
from pathlib import Path

from hope.files import atomic_file


def plot_loss(metrics: Path, picture: Path, title: str) -> None:
    """Draws the training and validation losses of a `metrics.jsonl` over tokens as a PNG."""
    from matplotlib.backends.backend_agg import (
        FigureCanvasAgg,
    )  # slow to import, and needed only here
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
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
    with atomic_file(picture) as path:
        figure.savefig(path)
