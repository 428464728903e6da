"""Loads the native extension, or says why it cannot be loaded and what mends it.

`HOPE_REFERENCE=1` in the environment runs every operator on its definition in plain PyTorch; then
the extension is neither needed nor loaded.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

REPORT = Path(__file__).with_name("build_report.json")
BUILD = "pip install --no-build-isolation --no-deps -e .    (in a checkout of hope_ext)"


def _asks_for_reference() -> bool:
    choice = os.environ.get("HOPE_REFERENCE", "")
    if choice not in ("", "0", "1"):
        raise ValueError(f"HOPE_REFERENCE must be 0, 1 or unset, got {choice!r}")
    return choice == "1"


# What the public functions call: the definitions, or the operators of a library of torch.ops.
REFERENCE, LIBRARY = "reference", "hope"
_called = REFERENCE if _asks_for_reference() else LIBRARY
_registrations: list[Callable[[str], None]] = []


def use_reference() -> bool:
    """Whether the definitions run instead of the kernels (`HOPE_REFERENCE=1`, or forced)."""
    return _called == REFERENCE


def operators() -> Any:
    """The kernels that run: `torch.ops.hope`, or another library in their place."""
    return getattr(torch.ops, _called)


def runs_cuda_kernels(x: torch.Tensor) -> bool:
    """Whether what runs on this tensor are CUDA kernels: on a GPU, or in tests' other library."""
    return _called != REFERENCE and (x.is_cuda or _called != LIBRARY)


@contextlib.contextmanager
def forced(called: str) -> Iterator[None]:
    """Runs the definitions, or another library's operators, inside the block (for tests)."""
    global _called
    before, _called = _called, called
    try:
        yield
    finally:
        _called = before


def register(stem: Callable[[str], None]) -> None:
    """`stem(library)` registers fake kernels and autograd of an operator: now, for the extension,
    and for every library that is loaded later."""
    _registrations.append(stem)
    if extension is not None:
        stem(LIBRARY)


def load_library(name: str, path: Path | str) -> None:
    """Loads another library with the extension's schemas, as `torch.ops.<name>`."""
    torch.ops.load_library(str(path))
    for stem in _registrations:
        stem(name)


def has_cuda_kernels() -> bool:
    """Whether the loaded extension has operators for CUDA tensors."""
    if use_reference():
        return False
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    return any(name.startswith("hope::") for name in registered)


def build_report() -> dict:
    """What the build wrote beside the extension: torch's and CUDA's version, and every kernel."""
    return json.loads(REPORT.read_text())


def load() -> ModuleType:
    """Import the extension, which registers its operators as `torch.ops.hope`.

    Raises:
        ImportError: naming the cause and the command that mends it.
    """
    here = REPORT.parent
    built = sorted(path.name for path in here.glob("_C.*"))
    if not built:
        raise _import_error(f"is not built in {here}")
    if not {f"_C{suffix}" for suffix in EXTENSION_SUFFIXES} & set(built):
        raise _import_error(f"was built for another Python ({', '.join(built)})")
    if not REPORT.exists():
        raise _import_error(f"is there without {REPORT.name}, which its build writes last")
    torch_then = build_report()["torch"]
    if _minor(torch_then) != _minor(torch.__version__):
        raise _import_error(f"was built with torch {torch_then}, this is torch {torch.__version__}")
    try:
        return importlib.import_module("hope_ext._C")
    except ImportError as error:
        raise _import_error(f"(built with torch {torch_then}) does not load: {error}") from error


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _import_error(what: str) -> ImportError:
    return ImportError(
        f"hope_ext: the native extension {what}. Build it:\n    {BUILD}\n"
        "or set HOPE_REFERENCE=1 to run without it, slowly",
        name="hope_ext._C",
    )


extension: ModuleType | None = None if use_reference() else load()
