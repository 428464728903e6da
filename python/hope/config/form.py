"""The JSON form of a config, and changes to it in words."""

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from hope.config.mixers import MIXER_KINDS, MixerConfig
from hope.errors import HopeError

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """The JSON form of a config: nested dicts; a mixer also carries its `kind`."""
    result: dict[str, Any] = {"kind": config.kind} if hasattr(config, "kind") else {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        result[item.name] = list(value) if isinstance(value, tuple) else value
    return result


def from_dict(cls: type[T], data: Mapping[str, Any], path: str = "") -> T:
    """The inverse of `to_dict`: missing fields take defaults, wrong ones raise HopeError."""
    if not isinstance(data, Mapping):
        raise HopeError(f"{path or cls.__name__} must be an object with fields, not {data!r}")
    hints = typing.get_type_hints(cls)
    names = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values = {}
    for name, value in data.items():
        here = f"{path}.{name}" if path else name
        if name not in names:
            raise HopeError(f"unknown field {here}; there are: {', '.join(names)}")
        values[name] = _parse(hints[name], value, here)
    try:
        return cls(**values)
    except HopeError as error:
        raise HopeError(f"{path}.{error}" if path else str(error)) from None


def _parse(hint: Any, value: Any, path: str) -> Any:
    if hint == MixerConfig:
        return _parse_mixer(value, path)
    if dataclasses.is_dataclass(hint):
        if hasattr(hint, "short") and not isinstance(value, Mapping):
            value = {hint.short: _parse(typing.get_type_hints(hint)[hint.short], value, path)}
        return from_dict(hint, value, path)  # type: ignore[type-var]
    if typing.get_origin(hint) is tuple:
        kind, *_ = typing.get_args(hint)
        plural = {int: "integers", float: "numbers", str: "strings"}[kind]
        kinds = (int, float) if kind is float else (kind,)
        if isinstance(value, (list, tuple)) and all(type(item) in kinds for item in value):
            return tuple(map(kind, value))
        raise HopeError(f"{path} must be a list of {plural}, not {value!r}")
    if type(None) in typing.get_args(hint):  # "T | None"
        if value is None:
            return None
        (hint,) = (item for item in typing.get_args(hint) if item is not type(None))
        return _parse(hint, value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**63 else math.inf
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 3e6 is a natural way to write a token budget
    if type(value) is float and not math.isfinite(value):
        raise HopeError(f"{path} must be a finite number, not {value}")
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise HopeError(f"{path} must be a number of 64 bits, not {value}")
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise HopeError(f"{path} must be of type {hint.__name__}, not {value!r}")


def _parse_mixer(value: Any, path: str) -> MixerConfig:
    if isinstance(value, str):  # the kind alone: its defaults
        value = {"kind": value}
    if not isinstance(value, Mapping) or value.get("kind") not in MIXER_KINDS:
        kind = value.get("kind") if isinstance(value, Mapping) else value
        raise HopeError(f"{path}.kind must be one of {', '.join(MIXER_KINDS)}, not {kind!r}")
    fields = {name: item for name, item in value.items() if name != "kind"}
    return from_dict(MIXER_KINDS[value["kind"]], fields, path)


def override(config: T, assignments: typing.Iterable[str]) -> T:
    """A copy of `config` with assignments such as `"model.dim=192"` made, in order.

    The value is JSON, or else a string. `model.mixer=attention` takes that mixer with its defaults.
    """
    data = to_dict(config)
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        *parents, name = path.strip().split(".")
        if not separator or not name:
            raise HopeError(f"an override looks like model.dim=192, not {assignment!r}")
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            value = text.strip()
        target = data
        for depth, parent in enumerate(parents):
            if not isinstance(target.get(parent), dict):
                where = ".".join(parents[: depth + 1])
                raise HopeError(f"{assignment!r}: there is no group of settings {where!r}")
            target = target[parent]
        if name not in target:
            known = ", ".join(target)
            raise HopeError(
                f"{assignment!r}: there is no setting {path.strip()!r}; there are: {known}"
            )
        target[name] = value
        # Parsed after every assignment: a later one may set a field of a mixer that this one chose.
        config = from_dict(type(config), data)
        data = to_dict(config)
    return config
