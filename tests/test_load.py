"""What `import hope_ext` says when its extension is missing or does not fit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hope_ext import _load


@pytest.fixture
def package(root, tmp_path) -> Path:
    """A package folder with the loader alone."""
    folder = tmp_path / "hope_ext"
    folder.mkdir()
    (folder / "__init__.py").write_text("from hope_ext import _load\n")
    shutil.copy(root / "hope_ext/_load.py", folder)
    return folder


def import_error(package: Path, **environment: str) -> str:
    script = f"import sys; sys.path[:] = [{str(package.parent)!r}, *sys.path]; import hope_ext"
    inherited = {k: v for k, v in os.environ.items() if k != "HOPE_REFERENCE"}
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    ).stderr


def test_an_extension_that_is_not_built(package):
    said = import_error(package)
    assert "ImportError: hope_ext: the native extension is not built in" in said
    assert "pip install --no-build-isolation" in said


def test_an_extension_for_another_python(package):
    (package / "_C.cpython-34-other.so").touch()
    assert "was built for another Python (_C.cpython-34-other.so)" in import_error(package)


def test_an_extension_for_another_torch(package):
    shutil.copy(_load.extension.__file__, package)
    (package / "build_report.json").write_text('{"torch": "2.1.0", "kernels": []}')
    said = import_error(package)
    assert f"was built with torch 2.1.0, this is torch {torch.__version__}" in said


def test_an_extension_that_is_broken(package):
    (package / Path(_load.extension.__file__).name).write_bytes(b"no library")
    (package / "build_report.json").write_text(f'{{"torch": "{torch.__version__}"}}')
    assert "does not load: " in import_error(package)


def test_the_reference_needs_no_extension(package):
    assert import_error(package, HOPE_REFERENCE="1") == ""
    assert "HOPE_REFERENCE must be 0, 1 or unset, got 'yes'" in import_error(
        package, HOPE_REFERENCE="yes"
    )
