"""Where the numbers of a run go: a record for every step and every validation.

A step's record: step, tokens, train_bits_per_byte, gradient_norm (before clipping), lr,
tokens_per_second and seconds (of training so far). A validation's: step, tokens and
validation_bits_per_byte.
"""

import json
import math
from pathlib import Path
from typing import Any

from hope.files import atomic_file


class JsonLines:
    """`metrics.jsonl`: one JSON object per record.

    step: the last one that stays. What a killed run wrote after its last checkpoint will be written
    again.
    """

    def __init__(self, path: Path, step: int) -> None:
        if path.exists():
            lines = path.read_text().splitlines()
            with atomic_file(path) as new:
                new.write_text("".join(line + "\n" for line in lines if _step_of(line) <= step))
        self._file = path.open("a", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    """The step of a metrics line; of one that a kill cut short, infinity."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf
