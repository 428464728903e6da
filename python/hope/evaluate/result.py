"""The file with an evaluation's figures."""

import json
import platform
from pathlib import Path
from typing import Any

import torch

import hope_ext
from hope.checkpoint import find_checkpoint, load_config
from hope.files import atomic_file
from hope.model import parameter_count


def write_result(path: Path, run: Path, task: str, content: dict[str, Any]) -> None:
    """Writes a JSON object: the task, the model and the machine, then `content`.

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
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "build": hope_ext.build_info(),
    }
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(about | content, indent=1) + "\n")
