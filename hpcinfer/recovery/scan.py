"""One pass over a byte range of the input: where its rows lie and what is known of them."""

from array import array
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpcinfer.data.rows import iter_rows, prompt_text

PREFIX_BYTES = 256  # prompts that agree in so many first bytes are worked on together
_MAX_COST = 2**32 - 1


class RowScan(NamedTuple):
    """Columns over the rows of a byte range, in order of the file."""

    offsets: np.ndarray  # uint64: first byte of the row
    lengths: np.ndarray  # uint32: bytes without the newline
    hashes: np.ndarray  # uint64: of the line
    prefixes: np.ndarray  # uint64: of the prompt's first 256 bytes, 0 for shorter prompts
    costs: np.ndarray  # uint32: expected work, in tokens


COLUMN_TYPES: dict[str, np.dtype[Any]] = {
    "offsets": np.dtype("<u8"), "lengths": np.dtype("<u4"), "hashes": np.dtype("<u8"),
    "prefixes": np.dtype("<u8"), "costs": np.dtype("<u4"),
}


def content_hash(line: bytes) -> int:
    """Hash a row; tells a row that changed since the index was built."""
    return int.from_bytes(blake2b(line, digest_size=8).digest(), "little")


def scan(path: Path, start: int, stop: int, kind: str) -> RowScan:
    """Read the rows whose first byte lies in [start, stop).

    Not collective.
    """
    return scan_rows(iter_rows(path, start, stop), kind)


def scan_rows(rows: Iterable[tuple[int, bytes]], kind: str) -> RowScan:
    """Describe rows given as (offset, line). Not collective."""
    types = COLUMN_TYPES.values()
    columns = [array(type_.char) for type_ in types]
    add_offset, add_length, add_hash, add_prefix, add_cost = (column.append for column in columns)
    for offset, line in rows:
        text, max_tokens = prompt_text(line, kind)
        add_offset(offset)
        add_length(len(line))
        add_hash(content_hash(line))
        add_prefix(content_hash(text[:PREFIX_BYTES]) if len(text) >= PREFIX_BYTES else 0)
        add_cost(min(max(len(text) // 4 + max_tokens, 0), _MAX_COST))
    return RowScan(*(np.frombuffer(column, type_) for column, type_ in zip(columns, types, strict=True)))
