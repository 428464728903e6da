"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import side_by_side
import torch
from emulator import build, library
from worlds import World

from hope_ext import testing

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if hasattr(item, "callspec") and item.callspec.params.get("backend") == "cuda":
            item.add_marker("on_gpu")
    if part := os.environ.get(side_by_side.PART):
        items[:] = side_by_side.of_part(items, part)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def emulator() -> None:
    """The emulator can run here; only a build without CUDA excuses that it cannot."""
    try:
        build.require("plain")
    except build.Unavailable as missing:
        if torch.version.cuda is None or os.environ.get("HOPE_CUDA") == "0":
            pytest.skip(str(missing))
        raise


@pytest.fixture(scope="session")
def emulated(emulator) -> None:
    """The backend "emulated" is there; HOPE_EMULATED_LIBRARY names another build of it."""
    testing.use_emulated(os.environ.get("HOPE_EMULATED_LIBRARY") or library.make())


@pytest.fixture(scope="module")
def world(request, tmp_path_factory) -> Iterator[World]:
    """Processes for a module's tests; `worlds.worlds` says how many."""
    processes = World(request.param, tmp_path_factory.mktemp("world"))
    yield processes
    processes.stop()


@pytest.fixture
def backend(request) -> Iterator[str]:
    """One of `backends.BACKENDS`, on which public functions run during the test."""
    if request.param == "emulated":
        request.getfixturevalue("emulated")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    with testing.backend(request.param):
        yield request.param


# Models, and definitions in PyTorch, so small that threads would only wait for each other.
ONE_THREAD = ("test_hope_", "test_ops", "test_selfmod", "test_cms")


@pytest.fixture(autouse=True)
def one_thread_for_small_work(request, monkeypatch) -> Iterator[None]:
    """Where other processes want the cores too, more threads take many times as long.

    Laws hold for any number of threads: test_repeat compares them.
    """
    if not request.path.name.startswith(ONE_THREAD):
        yield
        return
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for processes that the test starts
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
