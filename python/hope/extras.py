"""Packages that only some installations have."""

import importlib
from types import ModuleType

from hope.errors import HopeError


def need(module: str, extra: str, purpose: str) -> ModuleType:
    """The package `module`; HopeError names the extra that installs it, for `purpose`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise HopeError(
            f"{purpose} needs the package {module}, which cannot be imported ({error}); "
            f"it comes with: pip install 'hope_ext[{extra}]'"
        ) from error
