"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(autouse=True)
def one_thread_for_small_models(request, monkeypatch) -> Iterator[None]:
    """Tests of `hope` have models so small that threads wait for each other: several times longer
    where other processes want the cores too.
    """
    if not request.path.name.startswith("test_hope_"):
        yield
        return
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for processes that the test starts
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
