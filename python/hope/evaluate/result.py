"""The file with an evaluation's figures."""

import json
from pathlib import Path
from typing import Any

import torch

from hope.checkpoint import find_checkpoint, load_config
from hope.files import atomic_file
from hope.model import parameter_count
from hope.provenance import provenance


def write_result(
    path: Path, run: Path, device: torch.device, task: str, content: dict[str, Any]
) -> None:
    """Writes a JSON object: the task, the model and where it ran, then `content`.

    run: a run or checkpoint.
    """
    checkpoint = find_checkpoint(run)
    config = load_config(checkpoint)
    about = {
        "task": task,
        "run": str(run),
        "checkpoint": checkpoint.name,
        "preset": config.preset,
        "parameters": parameter_count(config.model),
        **provenance(device),
    }
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(about | content, indent=1) + "\n")
