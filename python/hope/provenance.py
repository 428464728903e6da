"""What is written down with every figure: when, by which command, on which machine and versions."""

import datetime
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

import hope_ext


def provenance(device: str | torch.device) -> dict[str, Any]:
    """The facts that a result depends on besides its settings, for a JSON file."""
    device, program = torch.device(device), Path(sys.argv[0])
    words = ["python", "-m", "hope"] if program.name == "__main__.py" else [program.name]
    return {
        "command": shlex.join([*words, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "build": hope_ext.build_info(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()
