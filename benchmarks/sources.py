"""The checkout: its operators, the hash of what each is compiled from, tools, and results' files.

Standard library only, so that it can be asked before the extension is built.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = ROOT / "build" / "benchmarks"  # for what is not worth keeping
NOT_STEMS = {"common", "selftest"}  # folders of csrc that are no operator


def stems() -> list[str]:
    """The operators' words, sorted."""
    return sorted({path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()} - NOT_STEMS)


def sources_hash(stem: str) -> str:
    """SHA-256 of everything that an operator is made of, names included: code, flags, gradients."""
    own = (f"{stem}.py", f"_{stem}_autograd.py", "_check.py")
    files = [ROOT / "build_config.py", *(ROOT / "hope_ext" / name for name in own)]
    files = [path for path in files if path.exists()]
    for folder in (ROOT / "csrc" / stem, ROOT / "csrc" / "common"):
        files += sorted(path for path in folder.rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def revision() -> dict[str, object]:
    """The commit, and whether anything but results differs from it; None outside a checkout.

    A copy without .git may be told its commit: HOPE_COMMIT, whose changes nobody can know.
    """
    if not (ROOT / ".git").exists():  # git would answer for a checkout that the copy lies in
        return {"commit": os.environ.get("HOPE_COMMIT"), "uncommitted_changes": None}
    changes = output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {
        "commit": output("git", "rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else changes != "",
    }


# ---- programs ------------------------------------------------------------------------------------


def output(*command: str) -> str | None:
    """What a command prints, run in the checkout; None where there is no such command, or it
    fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, or where toolkits are."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [str(Path(home) / part) for home in homes if home for part in ("bin", name)]
    folders += sorted(map(str, Path("/opt/nvidia").glob("nsight-compute/*")), reverse=True)
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


# ---- results -------------------------------------------------------------------------------------


def dated(out: Path, name: str) -> Path:
    """A path without suffix, `out/<date>-<name>` or with -2, -3, ... where that has a result."""
    stem = f"{datetime.date.today().isoformat()}-{name}"
    number = 1
    while (out / f"{stem}{f'-{number}' * (number > 1)}.json").exists():
        number += 1
    return out / f"{stem}{f'-{number}' * (number > 1)}"


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Writes a result; the file is whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(path)


def is_timed(result: dict[str, Any]) -> bool:
    """Whether a result of benchmarks.ops has a time of our operator (a layer's alone is none)."""
    return any(
        (row["contest"], row["row"]) == ("operator", "ours") and "median_ms" in row
        for row in result["rows"]
    )
