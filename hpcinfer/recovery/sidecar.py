"""Sidecars: for each line of a part file a fixed binary entry. A torn entry, or one whose line is torn, is ignored."""

import os
import secrets
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hpcinfer.recovery.durable import publish_bytes
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.patience import GONE, patiently

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
_HEADER = struct.Struct("<8sd16x")  # magic, time of creation by the file system's clock (informative)
_CHUNK_ENTRIES = 1 << 18
_VOID = np.dtype("<u8")  # offset of a line that does not count any more


class PartEntries(NamedTuple):
    """Some valid entries of one part."""

    part: str
    entries: np.ndarray


def header(created: float) -> bytes:
    """Make the first bytes of a sidecar; as long as an entry."""
    return _HEADER.pack(_MAGIC, created)


def created_time(sidecar: Path) -> float | None:
    """When the part was begun, by the file system's clock; None if the header is not whole. Not collective."""
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


def _are_whole(entries: np.ndarray, data_bytes: int) -> np.ndarray:
    """Tell which entries are whole and have their lines in the data file."""
    are_whole = (entries["check"] == _check_words(entries)) & (entries["length"] > 0)
    are_whole &= entries["offset"] + entries["length"] <= data_bytes
    return are_whole


def void_lines(paths: JobPaths, part: str, offsets: list[int]) -> None:
    """Let damaged lines of a part count no more: whoever reads the journal from now on misses them. Not collective."""
    publish_bytes(paths.part_void(part, secrets.token_hex(4)), np.array(offsets, _VOID).tobytes())


def rows_of_part(paths: JobPaths, part: str, attempt: int) -> set[int]:
    """Rows that a part has finished in an attempt. Not collective."""
    found = list(JournalReader(paths).read_part(part))
    return {int(row) for each in found for row in each.entries["row"][each.entries["attempt"] == attempt]}


class JournalReader:
    """Reads the sidecars of all parts, and later only what was added."""

    def __init__(self, paths: JobPaths) -> None:
        self._paths = paths
        self._positions: dict[str, int] = {}  # bytes of each sidecar up to its last whole entry
        self._holes: dict[str, list[int]] = {}  # positions of entries before it that are not whole
        self._voids: dict[str, np.ndarray] = {}  # by file

    def read(self) -> Iterator[PartEntries]:
        """Yield entries that are new since the last call, parts in order of their names. Not collective.

        An entry that is not whole is looked at again next time, since the files of a part may become visible
        in any order on a shared file system; those behind it count all the same.
        """
        suffix = self._paths.part_sidecar("").name
        names = patiently(lambda: os.listdir(self._paths.parts), self._paths.parts, errors=GONE)
        self._read_voids(names)
        for part in sorted(name.removesuffix(suffix) for name in names if name.endswith(suffix)):
            yield from self._look_again(part)
            if self._has_grown(part):
                yield from self.read_part(part)

    def _has_grown(self, part: str) -> bool:
        """A size may be old on a shared file system: what is new to us is opened, which asks the server."""
        sidecar = self._paths.part_sidecar(part)
        return part not in self._positions or patiently(lambda: _size_bytes(sidecar), sidecar) > self._positions[part]

    def _read_voids(self, names: list[str]) -> None:
        suffix = self._paths.part_void("", "").suffix
        for name in names:
            if name.endswith(suffix) and name not in self._voids:
                path = self._paths.parts / name
                data = patiently(path.read_bytes, path, errors=GONE)
                self._voids[name] = np.frombuffer(data, _VOID, len(data) // _VOID.itemsize)

    def _counted(self, part: str, entries: np.ndarray) -> Iterator[PartEntries]:
        """Leave out damaged lines."""
        voids = [offsets for name, offsets in self._voids.items() if name.startswith(f"{part}.")]
        if voids:
            entries = entries[~np.isin(entries["offset"], np.concatenate(voids))]
        if len(entries):
            yield PartEntries(part, entries)

    def _look_again(self, part: str) -> Iterator[PartEntries]:
        for position in self._holes.get(part, [])[:]:
            entries, are_whole = self._read_chunk(part, position, 1)
            if are_whole.any():
                self._holes[part].remove(position)
                yield from self._counted(part, entries)

    def read_part(self, part: str) -> Iterator[PartEntries]:
        """Yield entries of one part that are new since the last call. Not collective."""
        num_whole = _CHUNK_ENTRIES
        while num_whole == _CHUNK_ENTRIES:
            position = self._positions.setdefault(part, _HEADER.size)
            entries, are_whole = self._read_chunk(part, position, _CHUNK_ENTRIES)
            num_whole = int(np.flatnonzero(are_whole)[-1]) + 1 if are_whole.any() else 0
            holes = position + np.flatnonzero(~are_whole[:num_whole]) * ENTRY.itemsize
            if len(holes):
                self._holes.setdefault(part, []).extend(holes.tolist())
            self._positions[part] += num_whole * ENTRY.itemsize
            yield from self._counted(part, entries[are_whole])

    def _read_chunk(self, part: str, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Read entries, and then whether their lines are there: lines are written first."""
        sidecar, data = self._paths.part_sidecar(part), self._paths.part_data(part)
        entries = patiently(lambda: _read_entries(sidecar, position, count), sidecar)
        return entries, _are_whole(entries, patiently(lambda: _opened_size_bytes(data), data))


def _read_entries(path: Path, position: int, count: int) -> np.ndarray:
    try:
        with path.open("rb") as file:
            file.seek(position)
            data = file.read(count * ENTRY.itemsize)
    except FileNotFoundError:  # a name that the directory's cache still has
        data = b""
    return np.frombuffer(data, ENTRY, len(data) // ENTRY.itemsize)


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _opened_size_bytes(path: Path) -> int:
    """Size of a file as its server says it now."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return 0
