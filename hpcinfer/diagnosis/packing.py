"""Named tuples and dataclasses as bytes for a message, and back by their declared types."""

import dataclasses
import functools
import json
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def pack(value: Any) -> bytes:
    """Write a value of named tuples, dataclasses, tuples, dicts with string keys and plain values."""
    return json.dumps(_plain(value)).encode()


def unpack(kind: type[T], data: bytes) -> T:
    """Read what `pack` wrote of a value of that type."""
    value: T = _typed(kind, json.loads(data))
    return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


_hints = functools.cache(get_type_hints)


def _typed(kind: Any, value: Any) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if isinstance(value, list):
        return tuple(_typed(inner[0], item) for item in value)
    if not isinstance(value, dict):
        return value
    if origin is dict:
        return {key: _typed(inner[1], item) for key, item in value.items()}
    if inner:  # X | None
        return _typed(next(each for each in inner if each is not type(None)), value)
    hints = _hints(kind)
    return kind(**{name: _typed(hints[name], item) for name, item in value.items()})
