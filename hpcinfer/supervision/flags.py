"""Options as command-line flags again: the inverse of `hpcinfer.cli`."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any


def to_flags(values: Mapping[str, Any], config: type, *, given_only: bool = False) -> list[str]:
    """Write values of a config dataclass as flags.

    Args:
        values: by field name.
        config: a dataclass whose fields were made with `hpcinfer.config.option`.
        given_only: the values are those that the user gave, and count where they are the default too.
    """
    fields = [field for field in dataclasses.fields(config) if "help" in field.metadata and field.name in values
              and (given_only or values[field.name] != field.default)]  # fmt: skip
    return [flag for field in fields for flag in _flags(field, values[field.name])]


def _flags(field: "dataclasses.Field[Any]", value: Any) -> Iterator[str]:
    name = field.name.replace("_", "-")
    if isinstance(value, bool):
        yield f"--no-{name}" if field.default is True else f"--{name}"
    elif value is not None:
        for item in value if isinstance(value, tuple) else (value,):
            yield f"--{name}={_text(item)}"


def _text(value: Any) -> str:
    """Write a value as its parser reads it; a whole number of seconds, too, is no 5.0."""
    if isinstance(value, tuple):
        return "=".join(map(str, value))
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
