"""JSON as the input must be: UTF-8, one object, no key twice, no NaN, no half characters.

What is refused, and in which words, is the same under every interpreter: no limit and no message of Python's decides.
"""

import itertools
import json
import math
import re
from collections import Counter
from typing import Any, NoReturn

from hpcinfer.data.rows import BOM
from hpcinfer.errors import RequestError

MAX_DEPTH = 64  # objects and arrays inside each other, far from any recursion limit
MAX_DIGITS = 300  # characters of a number; Python's own limit is never below 640

_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)  # or what is left of one that does not end
_BRACKET = re.compile(r"[\[\]{}]")
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
        raise RequestError("invalid_utf8", f"byte {error.start} of the line is not UTF-8") from None


def parse_object(line: bytes) -> dict[str, Any]:
    """Parse one line that must be a JSON object.

    Raises:
        RequestError: anything else, with a code that names the kind.
    """
    text = decode_line(line)
    if _depth(text) > MAX_DEPTH:
        raise RequestError("invalid_json", f"objects and arrays more than {MAX_DEPTH} deep inside each other")
    try:
        values = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise RequestError("invalid_json", f"invalid JSON at character {error.pos}") from None
    if not isinstance(values, dict):
        raise RequestError("not_an_object", f"found a JSON {type_name(values)}, expected an object, one per line")
    if _SURROGATE_ESCAPE.search(text):
        _refuse_lone_surrogates(values)
    return values


def type_name(value: Any) -> str:
    """Say JSON's word for a value's type."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _depth(text: str) -> int:
    """Count how deep a text nests, up to where it stops being JSON."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return 0  # cannot be too deep
    brackets = _BRACKET.findall(_STRING.sub("", text))
    return max(itertools.accumulate(1 if bracket in "[{" else -1 for bracket in brackets), default=0)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise RequestError("duplicate_key", f"the key {twice!r} stands twice in one object", param=_printable(twice))
    return values


def _integer(digits: str) -> int:
    return int(_short(digits))


def _finite(digits: str) -> float:
    value = float(_short(digits))
    if not math.isfinite(value):
        raise RequestError("invalid_value", f"the number {digits} is too large for float64")
    return value


def _short(digits: str) -> str:
    if len(digits) > MAX_DIGITS:
        raise RequestError("invalid_json", f"a number of more than {MAX_DIGITS} characters")
    return digits


def _refuse_constant(name: str) -> NoReturn:
    raise RequestError("invalid_json", f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_int=_integer, parse_float=_finite,
                            parse_constant=_refuse_constant)  # fmt: skip


def _refuse_lone_surrogates(values: dict[str, Any]) -> None:
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError("lone_surrogate", "a \\ud800-\\udfff escape without its other half") from None


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
