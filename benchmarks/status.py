"""Which operators have been verified and timed on a GPU, and whether they have changed since.

    python -m benchmarks.status

It reads the files that `make gpu` and `python -m benchmarks.ops` wrote into benchmarks/results, and
compares the hash of each operator's sources with theirs. Without any it says "never".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import sources

EVENTS = ("verified", "timed")


@dataclass(frozen=True)
class Event:
    """An operator with these sources was verified or timed. date: ISO 8601."""

    stem: str
    what: str
    date: str
    gpu: str
    sources_sha256: str
    file: str


def events(folder: Path) -> Iterator[Event]:
    """What the result files of a folder tell."""
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if result.get("benchmark") == "gpu":
            for stem, facts in result["stems"].items():
                for what in EVENTS:
                    if facts[what]:
                        gpu, digest = result["gpu"]["name"], facts["sources_sha256"]
                        yield Event(stem, what, result["date"], gpu, digest, path.name)
        elif result.get("benchmark") == "ops" and result["device"] == "cuda":
            facts = result["environment"]
            if sources.is_timed(result):
                digest, gpu = facts["sources_sha256"], facts["gpu"]["name"]
                yield Event(result["op"], "timed", result["date"], gpu, digest, path.name)


def lines(stems: Sequence[str], folder: Path) -> list[str]:
    """A line for every operator and kind of event: the last one, or "never"."""
    found = list(events(folder))
    shown = []
    for stem in stems:
        now = sources.sources_hash(stem)
        for what in EVENTS:
            mine = [event for event in found if (event.stem, event.what) == (stem, what)]
            if not mine:
                shown.append(f"{stem}: {what}: never")
                continue
            last = max(mine, key=lambda event: event.date)
            state = "unchanged" if last.sources_sha256 == now else "CHANGED"
            day = last.date.partition("T")[0]
            shown.append(f"{stem}: {what}: {day} on {last.gpu}, {state} since ({last.file})")
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the list; returns 0."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.status",
        description="Lists when each operator was last verified and timed on a GPU.",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=sources.RESULTS,
        metavar="DIRECTORY",
        help="of the result files (default: benchmarks/results)",
    )
    options = parser.parse_args(arguments)
    print("\n".join(lines(sources.stems(), options.results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
