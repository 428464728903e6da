"""Checks of a setting's value."""

from hope.errors import HopeError


def require(condition: bool, name: str, expected: str, value: object) -> None:
    if not condition:
        raise HopeError(f"{name} must be {expected}, not {value!r}")


def choose(value: object, name: str, *choices: str) -> None:
    *others, last = map(repr, choices)
    require(value in choices, name, f"{', '.join(others)} or {last}", value)
