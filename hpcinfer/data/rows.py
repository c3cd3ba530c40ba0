"""Rows of an input file: where they start, and a cheap look at their text for the order of work.

A row is a line that is not blank. Lines end with \\n or \\r\\n; the last one may have no end. Standard library only.
"""

import io
import json
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

BOM = b"\xef\xbb\xbf"
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
MAX_ROW_BYTES = 64 << 20  # of a longer row only the first MAX_ROW_BYTES + 1 bytes are ever kept; it becomes an error
_PEEK_BYTES = 1 << 16  # of a line, when only its beginning matters
MAX_HINT = 2**31 - 1  # cap of the max_tokens that `prompt_text` reports


def input_kind(name: str, file: io.BufferedIOBase) -> str:
    """Tell "jsonl" from "text": a JSON suffix, or a first row that starts with "{", means jsonl.

    Args:
        name: the name that the user gave; a .gz at its end does not count.
        file: the plain (decompressed) content, at its start.
    """
    if name.lower().removesuffix(".gz").endswith(JSON_SUFFIXES):
        return "jsonl"
    first = b""
    while not first.strip() and (piece := file.readline(_PEEK_BYTES)):
        first = piece
    return "jsonl" if first.removeprefix(BOM).lstrip().startswith(b"{") else "text"


def iter_rows(path: str | os.PathLike[str], start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Yield (byte offset, line without its end) of every row whose first byte lies in [start, stop).

    A line longer than `MAX_ROW_BYTES` is cut behind one byte more. A byte order mark at the file's start is skipped.
    """
    with open(path, "rb", buffering=1 << 20) as file:
        offset = start
        if start > 0:
            file.seek(start - 1)
            offset += _skip_line(file)[0] - 1  # the rest of a line that began before `start`, or only its end
        while offset < stop and (line := file.readline(MAX_ROW_BYTES + 1 + len(b"\r\n"))):
            num_skipped, is_blank = (0, True) if line.endswith(b"\n") else _skip_line(file)
            lead = len(BOM) if offset == 0 and line.startswith(BOM) else 0
            if not (is_blank and not line[lead:].strip()):
                yield offset + lead, line[lead:].removesuffix(b"\n").removesuffix(b"\r")[:MAX_ROW_BYTES + 1]
            offset += len(line) + num_skipped


def _skip_line(file: BinaryIO) -> tuple[int, bool]:
    """Read to the end of a line, in pieces; returns how many bytes, and whether all of them are blank."""
    num_skipped, is_blank, piece = 0, True, b""
    while not piece.endswith(b"\n") and (piece := file.readline(_PEEK_BYTES)):
        num_skipped += len(piece)
        is_blank = is_blank and piece.isspace()
    return num_skipped, is_blank


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
