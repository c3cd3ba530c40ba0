"""Safetensors files, read lazily by slices as raw numpy values (bfloat16 as uint16), without torch.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data.
"""

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hpcinfer.dtypes import STORAGE, raw_bytes
from hpcinfer.errors import ModelError

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MAX_HEADER = 100_000_000  # bytes, the format's own limit
_MAX_READ = 1 << 30  # bytes per system call; Linux stops at 2 GiB


class TensorEntry(NamedTuple):
    """Where a tensor stands in its file."""

    dtype: str  # as in the file: F32, BF16, ...
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    stop: int


class SafetensorsFile:
    """One open file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise ModelError(f"cannot open a file of the model: {error.strerror}", where=str(path)) from error
        try:
            self.entries = _parse_header(path, self._file.fileno())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file. Not collective."""
        self._file.close()

    def dtype(self, name: str) -> str:
        """Element type of a tensor: float32, float16 or bfloat16. Not collective.

        Raises:
            ModelError: another type.
        """
        dtype = self.entries[name].dtype
        if dtype not in _DTYPES:
            raise ModelError(
                f"tensor {name} has the type {dtype}",
                expected=", ".join(_DTYPES),
                where=str(self.path),
                hint="take the model's original checkpoint, not a quantised one",
            )
        return _DTYPES[dtype]

    def read(self, name: str, rows: range | None = None) -> np.ndarray:
        """Read a tensor, or some rows of it, as stored. Not collective."""
        entry = self.entries[name]
        values = STORAGE[self.dtype(name)]
        rows = range(entry.shape[0]) if rows is None else rows
        row_bytes = math.prod(entry.shape[1:]) * values.itemsize
        out = np.empty((len(rows), *entry.shape[1:]), values)
        raw = raw_bytes(out)
        if read_exactly(self._file.fileno(), raw, entry.start + rows.start * row_bytes) != out.nbytes:
            raise ModelError(f"tensor {name} ends early", expected=f"{out.nbytes} bytes", where=str(self.path))
        return out


def read_exactly(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill a buffer from a byte offset of a file; returns the bytes read, fewer only at its end. Not collective."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done : done + _MAX_READ]], offset + done)
        if count == 0:
            break
        done += count
    return done


def _parse_header(path: Path, descriptor: int) -> dict[str, TensorEntry]:
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
        raise _damaged(path, f"header length {length} in a file of {size} bytes")
    try:
        header = json.loads(os.pread(descriptor, length, 8))
        header.pop("__metadata__", None)
        entries = {name: _entry(item, 8 + length) for name, item in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"header cannot be read: {type(error).__name__}: {error}") from error
    for name, entry in entries.items():
        _check_entry(path, name, entry, 8 + length, size)
    return entries


def _entry(item: dict[str, list[int]], data_start: int) -> TensorEntry:
    start, stop = item["data_offsets"]
    return TensorEntry(str(item["dtype"]), tuple(int(n) for n in item["shape"]), data_start + start, data_start + stop)


def _check_entry(path: Path, name: str, entry: TensorEntry, data_start: int, file_size: int) -> None:
    if not data_start <= entry.start <= entry.stop <= file_size:
        raise _damaged(path, f"tensor {name} at bytes {entry.start} to {entry.stop} of a file of {file_size} bytes")
    known = _DTYPES.get(entry.dtype)
    if known and math.prod(entry.shape) * STORAGE[known].itemsize != entry.stop - entry.start:
        raise _damaged(path, f"tensor {name} of {entry.shape} {entry.dtype} in {entry.stop - entry.start} bytes")


def _damaged(path: Path, found: str) -> ModelError:
    hint = "fetch the file again; a git-lfs pointer of some hundred bytes needs `git lfs pull`"
    return ModelError(found, expected="a complete safetensors file", where=str(path), hint=hint)
