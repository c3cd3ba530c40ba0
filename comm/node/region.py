"""Memory that the ranks of a node share: a file in memory that all map, and that has no name any more when they have.

Each rank reserves the pages of its own part: they lie near its cores, and a full file system is an error at the
beginning and not a signal later.

    name while it has one: hpcinfer-<PID namespace>-<creator>-<when that process began>-<random>
"""

import contextlib
import logging
import mmap
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from hpcinfer.comm.node.library import Library

LINE, PAGE = 64, 4096
_HEAD_BYTES = 2 * LINE  # hpc_part
_RING_HEAD_BYTES = 2 * LINE
_NAME = re.compile(r"hpcinfer-(\d+)-(\d+)-(\d+)-[0-9a-f]{16}")

logger = logging.getLogger(__name__)


class Geometry(NamedTuple):
    """How a region is divided: a part for each rank, with two slots, two rooms, and a ring to each rank."""

    size: int  # ranks
    slot_bytes: int
    room_bytes: int
    ring_bytes: int

    @property
    def rooms(self) -> int:
        """Where rooms begin in a part."""
        return _HEAD_BYTES + 2 * self.slot_bytes

    @property
    def rings(self) -> int:
        """Where rings begin in a part."""
        return self.rooms + 2 * self.room_bytes

    @property
    def part_bytes(self) -> int:
        """Bytes of a part, whole pages."""
        return _up(self.rings + self.size * (_RING_HEAD_BYTES + self.ring_bytes), PAGE)

    @property
    def total_bytes(self) -> int:
        """Bytes of the region."""
        return self.size * self.part_bytes

    def as_struct(self) -> dict[str, int]:
        """The fields of hpc_geometry."""
        return {**self._asdict(), "first_part": 0, "part_bytes": self.part_bytes, "slots": _HEAD_BYTES,
                "rooms": self.rooms, "rings": self.rings, "total_bytes": self.total_bytes}  # fmt: skip


class Created(NamedTuple):
    """A file that is there for all to map."""

    path: str
    geometry: Geometry


def create_file(folder: str, geometries: Sequence[Geometry]) -> Created | None:
    """Make the file of a region, and remove what dead ranks have left.

    Not collective.

    Args:
        folder: where files are memory.
        geometries: what would be good, best first.

    Returns:
        The first for which there is room; None if there is not enough for any.
    """
    try:
        remove_leftovers(folder)
        room = os.statvfs(folder)
        free_bytes = room.f_bavail * room.f_frsize
        for geometry in geometries:
            if geometry.total_bytes <= free_bytes:
                return Created(_create(folder, geometry.total_bytes), geometry)
        logger.warning("%s has too little room for shared memory: %d bytes", folder, free_bytes)
        return None
    except OSError as error:
        logger.warning("no shared memory in %s: %s", folder, error)
        return None


def _create(folder: str, num_bytes: int) -> str:
    owner = f"{os.getpid()}-{_start_of(os.getpid())}"
    path = os.path.join(folder, f"hpcinfer-{_namespace()}-{owner}-{secrets.token_hex(8)}")
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        os.ftruncate(file, num_bytes)
    finally:
        os.close(file)
    return path


def map_file(library: Library, path: str, geometry: Geometry, rank: int) -> mmap.mmap | None:
    """Reserve this rank's part of a region and map all of it; None if that cannot be.

    Not collective.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            if not library.lib.hpc_is_tmpfs(file):
                logger.warning("%s is not in memory: ranks of this node talk through the MPI", path)
                return None
            os.posix_fallocate(file, rank * geometry.part_bytes, geometry.part_bytes)
            return mmap.mmap(file, geometry.total_bytes)
        finally:
            os.close(file)
    except (OSError, ValueError) as error:
        logger.warning("no shared memory at %s: %s", path, error)
        return None


def remove_file(created: Created | None) -> None:
    """Take a region's name away; who has mapped it keeps it. Not collective."""
    if created is not None:
        _unlink(created.path)


def remove_leftovers(folder: str) -> None:
    """Remove files of ranks of this user that died before all had mapped them. Not collective."""
    for entry in _ours(folder):
        found = _NAME.fullmatch(entry.name)
        if found and int(found[1]) == _namespace() and _start_of(int(found[2])) != int(found[3]):
            _unlink(entry.path)


def _ours(folder: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                    yield entry


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _namespace() -> int:
    """The number of the PID namespace: a process number means nothing in another one."""
    return os.stat("/proc/self/ns/pid").st_ino


def _start_of(pid: int) -> int:
    """When a process began, in ticks since boot; 0 if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[19])


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
