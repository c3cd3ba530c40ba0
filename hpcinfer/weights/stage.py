"""Copies of a store's units on a node's own disk, for restarted steps and for the next job on the node.

Whatever is wrong with them is no error: the caller compares checksums, and reads from the store what does not agree.
See docs/store.md.
"""

import errno
import logging
import os
import stat
import struct
import threading
import zlib
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hpcinfer.weights.requests import Chunk
from hpcinfer.weights.store_format import StoredParam

log = logging.getLogger(__name__)

MAX_PENDING = 256 << 20  # bytes that wait to be written; what does not fit is left for another job
_PAGE = 4096  # bytes; every unit begins at a multiple of it
_RECORD = struct.Struct("<II")  # unit number, checksum of it and the digest
_ROOT = 0  # a user whom everybody trusts
_IDLE_S = 0.5  # seconds without new units after which those that were written are listed
_FREE_SHARE = 20  # one part in so many of the disk is left free


class _Row(NamedTuple):
    """Where the units of one parameter stand."""

    file: str
    start: int  # byte offset of the first unit
    stride: int  # bytes from unit to unit
    first: int  # number of the first unit


class _Copy(NamedTuple):
    """One unit on its way to the disk."""

    number: int
    path: Path
    start: int
    data: memoryview  # own memory


class Stage:
    """What one process knows of the copies, and a thread that writes more; several processes may write at once."""

    def __init__(self, folder: Path, digest: str, parameters: Mapping[str, StoredParam], unit_bytes: Mapping[str, int]):
        """Open or make a stage. Not collective. Where that fails there is one warning, and a stage that stays empty.

        Args:
            folder: of the node; this store's copies go to a folder of its own there.
            digest: of the store.
            parameters: of the store, in its order.
            unit_bytes: size of a unit of each.
        """
        self.path = Path(folder) / digest
        self._digest, self._parameters = digest.encode(), parameters
        self._rows = _rows(parameters, unit_bytes)
        self._known: set[int] = set()  # numbers of units that are listed
        self._read_so_far: dict[str, int] = {}  # bytes of each list
        self._list = f"{os.uname().nodename}-{os.getpid()}-{os.urandom(4).hex()}.list"  # nobody else's
        self._change = threading.Condition()  # guards what follows
        self._waiting: deque[_Copy] = deque()
        self._pending = 0  # bytes that wait
        self._thread: threading.Thread | None = None
        self._is_off = False  # nothing is written any more
        self._has_warned = False  # of damage
        self.is_open = False  # nothing is read either
        try:
            _make_private(self.path)
            self._read_lists()
            self.is_open = True
        except OSError as error:
            self._give_up(error)

    def has(self, name: str, unit: int) -> bool:
        """Whether a unit is listed. Not collective."""
        return self._number(name, unit) in self._known

    def chunk(self, name: str, unit: int, raw: memoryview) -> Chunk:
        """Say where a unit stands that is to fill some memory. Not collective."""
        row = self._rows[name]
        return Chunk(self.path / row.file, row.start + unit * row.stride, raw, self._parameters[name].checksums[unit])

    def forget(self, name: str, unit: int) -> None:
        """Count a unit as missing: its copy is damaged or gone. Not collective."""
        if not self._has_warned:
            log.warning("copies in %s are damaged or gone; weights come from the store", self.path)
        self._has_warned = True
        self._known.discard(self._number(name, unit))

    def keep(self, name: str, unit: int, raw: memoryview) -> None:
        """Have a unit written by and by, unless too much waits; the memory is free again on return. Not collective."""
        with self._change:
            if self._is_off or self.has(name, unit) or self._pending + len(raw) > MAX_PENDING:
                return
            self._pending += len(raw)
        place = self.chunk(name, unit, raw)
        copy = _Copy(self._number(name, unit), place.path, place.start, _copied(raw))
        with self._change:
            self._waiting.append(copy)
            self._change.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_waiting, name="stage")
                self._thread.start()

    def flush(self) -> None:
        """Wait until all that was to be kept is on the disk and listed. Not collective."""
        with self._change:
            thread = self._thread
        if thread is not None:
            thread.join()

    def refresh(self) -> None:
        """Take notice of what other processes have listed since. Not collective."""
        if self.is_open:
            with suppress(OSError):  # a folder that is gone
                self._read_lists()

    def _read_lists(self) -> None:
        for entry in os.scandir(self.path):
            size, done = entry.stat(follow_symlinks=False).st_size, self._read_so_far.get(entry.name, 0)
            if entry.name.endswith(".list") and size - done >= _RECORD.size:
                records = _read_from(self.path / entry.name, done)
                whole = len(records) // _RECORD.size * _RECORD.size  # the last one may still be on its way
                self._known.update(self._listed(records[:whole]))
                self._read_so_far[entry.name] = done + whole

    def _number(self, name: str, unit: int) -> int:
        return self._rows[name].first + unit

    def _listed(self, records: bytes) -> set[int]:
        return {number for number, checksum in _RECORD.iter_unpack(records) if checksum == self._seal(number)}

    def _seal(self, number: int) -> int:
        return zlib.crc32(self._digest + number.to_bytes(4, "little"))

    def _write_waiting(self) -> None:
        """The thread: write what waits, list it, end when nothing comes any more."""
        batch = _Batch()
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting, _IDLE_S)
                copy = self._waiting.popleft() if self._waiting else None
            if copy is not None:
                self._write(batch, copy)
                continue
            self._publish(batch)
            with self._change:
                if not self._waiting:
                    self._thread = None
                    return
            batch = _Batch()

    def _write(self, batch: "_Batch", copy: _Copy) -> None:
        try:
            if not self._is_off:
                batch.write(copy)
        except OSError as error:
            self._give_up(error)
        finally:
            with self._change:
                self._pending -= len(copy.data)

    def _publish(self, batch: "_Batch") -> None:
        """List what has been written, once it is durable."""
        records = b"".join(_RECORD.pack(number, self._seal(number)) for number in batch.numbers)
        try:
            batch.sync()
            if records:
                _append(self.path / self._list, records)
                self._known.update(batch.numbers)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Write no more; say so once."""
        if not self._is_off:
            reason = error.strerror or str(error)
            log.warning("nothing more is staged in %s: %s; weights come from the store", self.path, reason)
        self._is_off = True


class _Batch:
    """Units that have been written and are not listed yet."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._files: dict[Path, int] = {}  # open descriptors

    def write(self, copy: _Copy) -> None:
        """Write one unit at its place."""
        if copy.path not in self._files:
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._files[copy.path] = os.open(copy.path, flags, 0o600)
        descriptor, done = self._files[copy.path], 0
        _check_room(descriptor, len(copy.data))
        while done < len(copy.data):
            done += os.pwrite(descriptor, copy.data[done:], copy.start + done)
        self.numbers.append(copy.number)

    def sync(self) -> None:
        """Make all of them durable, and close the files."""
        with ExitStack() as stack:
            for descriptor in self._files.values():
                stack.callback(os.close, descriptor)
            for descriptor in self._files.values():
                os.fdatasync(descriptor)


def _rows(parameters: Mapping[str, StoredParam], unit_bytes: Mapping[str, int]) -> dict[str, _Row]:
    """Give every unit a number and a place, by the store's index alone: equal for all stores with one digest."""
    rows, number, ends = dict[str, _Row](), 0, dict[str, int]()
    for name, param in parameters.items():
        file, stride = Path(param.file).stem + ".units", -(-unit_bytes[name] // _PAGE) * _PAGE
        rows[name] = _Row(file, ends.get(file, 0), stride, number)
        number += len(param.checksums)
        ends[file] = rows[name].start + len(param.checksums) * stride
    return rows


def _make_private(path: Path) -> None:
    """Make a folder where only we write, or refuse one where others may: what is read there goes into the model."""
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        if not path.is_dir():  # else it was made before the place became read-only
            raise
    place = os.stat(path.parent)  # who may rename there puts another folder in the place of ours
    if not _is_trusted(place) and not (place.st_uid in (os.geteuid(), _ROOT) and place.st_mode & stat.S_ISVTX):
        raise PermissionError(errno.EPERM, "others may write there", str(path.parent))
    found = os.stat(path, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if not _is_trusted(found):
        raise PermissionError(errno.EPERM, "others may write there", str(path))


def _is_trusted(found: os.stat_result) -> bool:
    """Whether nobody writes there but we and root."""
    return found.st_uid in (os.geteuid(), _ROOT) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _copied(raw: memoryview) -> memoryview:
    """Copy bytes; other threads go on meanwhile, which `bytes` would not let them."""
    return np.frombuffer(raw, np.uint8).copy().data


def _check_room(descriptor: int, num_bytes: int) -> None:
    found = os.fstatvfs(descriptor)
    if found.f_blocks and (found.f_bavail - found.f_blocks // _FREE_SHARE) * found.f_frsize < num_bytes:
        raise OSError(errno.ENOSPC, f"less than {100 // _FREE_SHARE} % of the disk would stay free")


def _read_from(path: Path, start: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read()


def _append(path: Path, records: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        written = os.write(descriptor, records)
        os.fsync(descriptor)
        if written < len(records):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)
