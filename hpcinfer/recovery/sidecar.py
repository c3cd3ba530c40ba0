"""Sidecars: for each line of a part file a fixed binary entry. A torn entry, or one whose line is torn, is ignored."""

import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hpcinfer.recovery.layout import JobPaths

ENTRY = np.dtype([
    ("row", "<u8"),
    ("offset", "<u8"),  # of the line in the part's data file
    ("length", "<u4"),  # bytes with the newline
    ("crc", "<u4"),  # CRC-32 of the line with the newline
    ("generation", "<u4"),  # of the claim
    ("attempt", "u1"),  # 0, and one more for each --retry-errors
    ("flags", "u1"),
    ("check", "<u2"),  # exclusive or of the other 16-bit words and a constant
])
IS_ERROR = 1  # flag: the line is an error record

_SEAL = 0x4A0B  # makes an entry of zeros invalid
_MAGIC = b"hpcside1"
_HEADER = struct.Struct("<8sd16x")  # magic, time of creation by the writer's clock (informative)
_CHUNK_ENTRIES = 1 << 18


class PartEntries(NamedTuple):
    """Some valid entries of one part."""

    part: str
    entries: np.ndarray


def header() -> bytes:
    """Make the first bytes of a sidecar; as long as an entry."""
    return _HEADER.pack(_MAGIC, time.time())


def created_time(sidecar: Path) -> float | None:
    """When the part was begun, by its writer's clock; None if the header is not whole. Not collective."""
    with sidecar.open("rb") as file:
        data = file.read(_HEADER.size)
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        return None
    return float(_HEADER.unpack(data)[1])


def seal(entries: np.ndarray) -> np.ndarray:
    """Fill in the check words."""
    entries["check"] = _check_words(entries)
    return entries


def _check_words(entries: np.ndarray) -> np.ndarray:
    words = entries.view("<u2").reshape(len(entries), ENTRY.itemsize // 2)
    return np.bitwise_xor.reduce(words[:, :-1], axis=1) ^ np.uint16(_SEAL)


def _num_whole(entries: np.ndarray, data_bytes: int) -> int:
    """Count the entries before the first one that is not whole or whose line is not there."""
    is_whole = (entries["check"] == _check_words(entries)) & (entries["length"] > 0)
    is_whole &= entries["offset"] + entries["length"] <= data_bytes
    return len(entries) if is_whole.all() else int(np.argmin(is_whole))


class JournalReader:
    """Reads the sidecars of all parts, and later only what was added."""

    def __init__(self, paths: JobPaths) -> None:
        self._paths = paths
        self._positions: dict[str, int] = {}  # bytes that are read of each sidecar

    def read(self) -> Iterator[PartEntries]:
        """Yield entries that are new since the last call, parts in order of their names. Not collective.

        A reader stops at the first entry that is not whole and looks at it again next time, since the files
        of a part may become visible in any order on a shared file system.
        """
        for part, size_bytes in self._sidecars():
            if size_bytes > self._positions.get(part, 0):
                yield from self._read_part(part)

    def _sidecars(self) -> list[tuple[str, int]]:
        suffix = self._paths.part_sidecar("").name
        with os.scandir(self._paths.parts) as found:
            return sorted((item.name.removesuffix(suffix), item.stat().st_size) for item in found
                          if item.name.endswith(suffix))

    def _read_part(self, part: str) -> Iterator[PartEntries]:
        data_bytes = _size_bytes(self._paths.part_data(part))
        with self._paths.part_sidecar(part).open("rb") as file:
            if part not in self._positions:
                if not file.read(_HEADER.size).startswith(_MAGIC):
                    return
                self._positions[part] = _HEADER.size
            file.seek(self._positions[part])
            while data := file.read(_CHUNK_ENTRIES * ENTRY.itemsize):
                entries = np.frombuffer(data, ENTRY, len(data) // ENTRY.itemsize)
                num_whole = _num_whole(entries, data_bytes)
                self._positions[part] += num_whole * ENTRY.itemsize
                if num_whole:
                    yield PartEntries(part, entries[:num_whole])
                if num_whole * ENTRY.itemsize < len(data):
                    return


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
