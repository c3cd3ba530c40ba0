"""Memory that the ranks of a node share: a file in memory that all map, and that has no name any more when they have.

Each rank reserves the pages of its own part: they lie near its cores, and a full file system is an error at the
beginning and not a signal later.

    name while it has one: hpcinfer-<PID namespace>-<creator>-<when that process began>-<random>
"""

import contextlib
import errno
import logging
import mmap
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from hpcinfer.comm.node.library import Library
from hpcinfer.comm.protocol import Collectives

T = TypeVar("T")
D = TypeVar("D")

FOLDER = "/dev/shm"  # where files are memory
LINE, PAGE = 64, 4096
_HEAD_BYTES = 2 * LINE  # hpc_part
_RING_HEAD_BYTES = 2 * LINE
_RING_BUDGET_BYTES, _MAX_ROOM_BYTES, _SMALL_BYTES = 1 << 21, 1 << 23, 1 << 14
_NAME = re.compile(r"hpcinfer-(\d+)-(\d+)-(\d+)-[0-9a-f]{16}")

logger = logging.getLogger(__name__)


class Parts(Protocol):
    """What a region is divided into: a part for each rank, in whole pages."""

    @property
    def part_bytes(self) -> int:
        """Bytes of a part."""

    @property
    def total_bytes(self) -> int:
        """Bytes of the region."""


G = TypeVar("G", bound=Parts)


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


def possible_geometries(size: int, room_bytes: int, slot_bytes: int) -> list[Geometry]:
    """Say what a region may look like, best first: without rooms, and then small, where memory is short.

    Not collective. There are as many whatever the sizes are.
    """
    ring_bytes = min(1 << 20, max(_SMALL_BYTES, _RING_BUDGET_BYTES // max(1, size - 1)))
    room_bytes = _up(min(room_bytes, _MAX_ROOM_BYTES), LINE)
    best = Geometry(size, _up(slot_bytes, LINE), room_bytes, _up(ring_bytes, LINE))
    least = _up(min(slot_bytes, 4 * _SMALL_BYTES), LINE)
    return [best, best._replace(room_bytes=0), Geometry(size, least, 0, _SMALL_BYTES)]


def open_region(
    group: Collectives, members: Sequence[int], geometries: Sequence[G], folder: str, library: Library | None,
    *, instead: str = "ranks of this node share nothing",
) -> tuple[mmap.mmap, G] | None:  # fmt: skip
    """Share memory on every node of a group: the first geometry of which all ranks of all nodes have got their pages.

    Collective over the group. Others may take memory at the same time: whether there is enough is known when the pages
    are there, and not before.

    Args:
        group: all ranks call this.
        members: its ranks on this node.
        geometries: what would be good on this node, best first; as many on all nodes.
        folder: where files are memory.
        library: None where there is none.
        instead: what happens where memory cannot be shared, in the words of a warning.

    Returns:
        The memory and its geometry; None on every rank, if any rank has no library or cannot share memory.
    """
    rank, problem = list(members).index(group.rank), ""
    for geometry in geometries:
        path, memory = "", None
        try:
            if library is not None and rank == 0:
                path, problem = _tried(partial(create_file, folder, geometry), "")
            path = group.all_gather_bytes(path.encode())[members[0]].decode()
            if library is not None and path:
                memory, problem = _tried(partial(map_file, library, path, geometry, rank), None)
            states = group.all_gather_bytes(b"none" if library is None else b"%d" % (memory is not None))
        finally:
            _unlink(path)  # each member: the one that made it may be dead
        if memory is not None and set(states) == {b"1"}:
            return memory, geometry
        if memory is not None:
            memory.close()
        if b"none" in states:
            return None
    if problem:
        logger.warning("%s, without shared memory: %s", instead, problem)
    return None


def _tried(work: Callable[[], T], otherwise: D) -> tuple[T | D, str]:
    """What work gives, or something else and why."""
    try:
        return work(), ""
    except OSError as error:
        return otherwise, str(error)


def create_file(folder: str, geometry: Parts) -> str:
    """Make the file of a region, and remove what dead ranks have left.

    Not collective.

    Raises:
        OSError: there is no such folder, or too little room in it.
    """
    remove_leftovers(folder)
    room = os.statvfs(folder)
    free_bytes = room.f_bavail * room.f_frsize
    if geometry.total_bytes > free_bytes:
        raise OSError(errno.ENOSPC, f"{free_bytes} bytes are free, {geometry.total_bytes} are needed", folder)
    owner = f"{os.getpid()}-{_start_of(os.getpid())}"
    path = os.path.join(folder, f"hpcinfer-{_namespace()}-{owner}-{secrets.token_hex(8)}")
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        os.ftruncate(file, geometry.total_bytes)
    except OSError:
        _unlink(path)
        raise
    finally:
        os.close(file)
    return path


def map_file(library: Library, path: str, geometry: Parts, rank: int) -> mmap.mmap:
    """Reserve this rank's part of a region and map all of it.

    Not collective. A part may be written when its rank has come back from here, and no sooner.

    Raises:
        OSError: there are no pages for it, or the file is not in memory.
    """
    file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        if not library.lib.hpc_is_tmpfs(file):
            raise OSError(errno.ENOTSUP, "not in memory", path)
        os.posix_fallocate(file, rank * geometry.part_bytes, geometry.part_bytes)
        return mmap.mmap(file, geometry.total_bytes)
    finally:
        os.close(file)


def remove_leftovers(folder: str) -> None:
    """Remove files of ranks of this user that died before all had mapped them. Not collective."""
    for entry in _ours(folder):
        found = _NAME.fullmatch(entry.name)
        with contextlib.suppress(OSError):  # what cannot be looked at may live
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
        data = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(data.rpartition(b")")[2].split()[19])


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
