"""JSON as the input must be: UTF-8, one object, no key twice, no NaN, no half characters."""

import json
import re
from typing import Any

from hpcinfer.data.rows import BOM
from hpcinfer.errors import RequestError

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def decode_line(line: bytes) -> str:
    """Decode one line.

    Raises:
        RequestError: a byte order mark, or bytes that are not UTF-8.
    """
    if line.startswith(BOM):
        raise RequestError("byte_order_mark", "the line begins with a byte order mark; save as UTF-8 without it")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise RequestError("invalid_utf8", f"byte {error.start} of the line is not UTF-8: {error.reason}") from None


def parse_object(line: bytes) -> dict[str, Any]:
    """Parse one line that must be a JSON object.

    Raises:
        RequestError: anything else, with a code that names the kind.
    """
    text = decode_line(line)
    try:
        values = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise RequestError("invalid_json", f"invalid JSON at character {error.pos}: {error.msg}") from None
    except (ValueError, RecursionError):
        raise RequestError("invalid_json", "invalid JSON: a number too long or values nested too deep") from None
    if not isinstance(values, dict):
        raise RequestError("not_an_object", f"found a JSON {type_name(values)}, expected an object, one per line")
    if _SURROGATE_ESCAPE.search(text):
        _refuse_lone_surrogates(values)
    return values


def type_name(value: Any) -> str:
    """Say JSON's word for a value's type."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError("duplicate_key", f"the key {twice!r} stands twice in one object", param=_printable(twice))
    return values


def _refuse_constant(name: str) -> None:
    raise RequestError("invalid_json", f"{name} is not JSON")


def _refuse_lone_surrogates(values: dict[str, Any]) -> None:
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError("lone_surrogate", "a \\ud800-\\udfff escape without its other half") from None


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
