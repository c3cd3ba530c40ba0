"""Rows of an input file: where they start, and a cheap look at their text for the order of work.

A row is a line that is not blank. Lines end with \\n or \\r\\n; the last one may have no end. Standard library only.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

BOM = b"\xef\xbb\xbf"
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
MAX_HINT = 2**31 - 1  # cap of the max_tokens that `prompt_text` reports


def input_kind(path: str | os.PathLike[str], name: str | None = None) -> str:
    """Tell "jsonl" from "text": a JSON suffix, or a first row that starts with "{", means jsonl.

    Args:
        path: the plain (decompressed) file.
        name: the name that the user gave, if another; a .gz at its end does not count.
    """
    if str(name or path).lower().removesuffix(".gz").endswith(JSON_SUFFIXES):
        return "jsonl"
    _, first = next(iter_rows(path, 0, os.path.getsize(path)), (0, b""))
    return "jsonl" if first.removeprefix(BOM).lstrip().startswith(b"{") else "text"


def iter_rows(path: str | os.PathLike[str], start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Yield (byte offset, line without its end) of every row whose first byte lies in [start, stop)."""
    with open(path, "rb", buffering=1 << 20) as file:
        offset = start
        if start > 0:
            file.seek(start - 1)
            offset += len(file.readline()) - 1  # the rest of a line that began before `start`, or only its end
        while offset < stop and (line := file.readline()):
            if not line.isspace():
                yield offset, line.removesuffix(b"\n").removesuffix(b"\r")
            offset += len(line)


def prompt_text(line: bytes, kind: str) -> tuple[bytes, int]:
    """Guess what a row says and how many tokens it asks for (0: not said).

    Never raises: a malformed row is its own text.
    """
    if kind == "text":
        return line, 0
    try:
        values = json.loads(line.removeprefix(BOM).decode())
        body = values.get("body", values)
        wanted = body.get("max_tokens") or body.get("max_completion_tokens")
        text = _joined(body["messages"] if "messages" in body else body["prompt"])
        return text.encode("utf-8", "surrogatepass"), min(max(wanted, 0), MAX_HINT) if type(wanted) is int else 0
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return line, 0


def _joined(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise TypeError
    return "".join(_part_text(part) for part in prompt)


def _part_text(part: Any) -> str:
    """Text of a message, of one of its content parts, or of a token id."""
    if isinstance(part, dict):
        return _joined(part.get("content") or part.get("text") or "")
    return f"{part} "
