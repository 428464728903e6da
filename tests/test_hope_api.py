"""The public names and their signatures are those of tests/public_api.txt."""

from __future__ import annotations

import functools
import importlib
import inspect
from pathlib import Path
from types import GenericAlias

import pytest

FILE = Path(__file__).parent / "public_api.txt"
MODULES = (
    *("hope_ext", "hope", "hope.config", "hope.continual", "hope.data", "hope.evaluate"),
    *("hope.hf", "hope.layers", "hope.optim", "hope.parallel", "hope.train"),
)


def described(module: str) -> list[str]:
    """A line for every public name of a module, and for every public method of a class."""
    lines = []
    for name in sorted(importlib.import_module(module).__all__):
        value = getattr(importlib.import_module(module), name)
        if inspect.isclass(value):
            lines.append(f"{module}.{name}{_signature(value.__dict__.get('__init__'), skip=1)}")
            lines += [
                f"{module}.{name}.{method}{_signature(member)}"
                for method, member in sorted(vars(value).items())
                if not method.startswith("_")
                and _is_its_own(value, member)
                and (callable(member) or isinstance(member, _DESCRIPTORS))
            ]
        elif callable(value) and not isinstance(value, GenericAlias):  # of a type
            lines.append(f"{module}.{name}{_signature(value)}")
        else:
            lines.append(f"{module}.{name}: {type(value).__name__}")
    return lines


def _is_its_own(class_: type, member: object) -> bool:
    """torch wraps an optimizer's inherited step, when one is made, and puts it into its class."""
    return not inspect.isfunction(member) or member.__qualname__.startswith(class_.__name__)


_DESCRIPTORS = (classmethod, functools.cached_property, property, staticmethod)


def _signature(value: object, skip: int = 0) -> str:
    """The parameters, without annotations (which Python's versions print in several ways)."""
    if isinstance(value, (classmethod, staticmethod)):
        value = value.__func__
    if not callable(value):  # a property, or a class without a constructor of its own
        return ""
    signature = inspect.signature(value)
    empty = inspect.Parameter.empty
    parameters = [
        parameter.replace(annotation=empty, default=_plain(parameter.default))
        for parameter in list(signature.parameters.values())[skip:]
    ]
    return str(inspect.Signature(parameters))


def _plain(default: object) -> object:
    """A default that prints the same in every process."""
    return default if " at 0x" not in repr(default) else type(default)


@pytest.mark.parametrize("module", MODULES)
def test_the_public_names_and_signatures_are_kept(module):
    if module == "hope.hf":
        pytest.importorskip("transformers", reason="hope.hf needs it")
    lines = FILE.read_text().splitlines()
    pinned = [line for line in lines if line.split("(")[0].split(":")[0].startswith(f"{module}.")]
    others = [f"{name}." for name in MODULES if name.startswith(f"{module}.")]
    pinned = [line for line in pinned if not line.startswith(tuple(others))]
    now = described(module)
    gone, new = sorted(set(pinned) - set(now)), sorted(set(now) - set(pinned))
    assert (gone, new) == ([], []), (
        "the public API differs from tests/public_api.txt. If that is meant, run `python "
        "tests/test_hope_api.py` and say in CHANGELOG.md what users have to change"
    )


if __name__ == "__main__":
    FILE.write_text("".join(f"{line}\n" for module in MODULES for line in described(module)))
