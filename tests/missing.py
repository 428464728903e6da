"""Tools that a machine may lack: the tests that need them are skipped, but not in CI."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

REQUIRED = "HOPE_TOOLS_REQUIRED"  # .ci/run sets it: there nobody would notice what is skipped


def missing(reason: object) -> NoReturn:
    """Skips the test, or fails it where REQUIRED is set."""
    if os.environ.get(REQUIRED):
        pytest.fail(f"{reason}; {REQUIRED} is set")
    pytest.skip(str(reason))
