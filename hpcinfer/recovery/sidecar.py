"""Sidecars: for each line of a part file a fixed binary entry. A torn entry, or one whose line is torn, is ignored."""

import os
import secrets
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hpcinfer.recovery.durable import publish_bytes
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
_VOID = np.dtype("<u8")  # offset of a line that does not count any more


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


def void_lines(paths: JobPaths, part: str, offsets: list[int]) -> None:
    """Let damaged lines of a part count no more: whoever reads the journal from now on misses them. Not collective."""
    publish_bytes(paths.part_void(part, secrets.token_hex(4)), np.array(offsets, _VOID).tobytes())


class JournalReader:
    """Reads the sidecars of all parts, and later only what was added."""

    def __init__(self, paths: JobPaths) -> None:
        self._paths = paths
        self._positions: dict[str, int] = {}  # bytes that are read of each sidecar
        self._voids: dict[str, np.ndarray] = {}  # by file

    def read(self) -> Iterator[PartEntries]:
        """Yield entries that are new since the last call, parts in order of their names. Not collective.

        A reader stops at the first entry that is not whole and looks at it again next time, since the files
        of a part may become visible in any order on a shared file system.
        """
        suffix = self._paths.part_sidecar("").name
        names = os.listdir(self._paths.parts)
        self._read_voids(names)
        for part in sorted(name.removesuffix(suffix) for name in names if name.endswith(suffix)):
            if _size_bytes(self._paths.part_sidecar(part)) > self._positions.get(part, 0):
                yield from self._read_part(part)

    def _read_voids(self, names: list[str]) -> None:
        suffix = self._paths.part_void("", "").suffix
        for name in names:
            if name.endswith(suffix) and name not in self._voids:
                self._voids[name] = np.fromfile(self._paths.parts / name, _VOID)

    def _without_voids(self, part: str, entries: np.ndarray) -> np.ndarray:
        voids = [offsets for name, offsets in self._voids.items() if name.startswith(f"{part}.")]
        return entries[~np.isin(entries["offset"], np.concatenate(voids))] if voids else entries

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
                    yield PartEntries(part, self._without_voids(part, entries[:num_whole]))
                if num_whole * ENTRY.itemsize < len(data):
                    return


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
