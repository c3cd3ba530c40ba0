"""Lines out of the parts into their places in the output: sequential reads, one sequential write."""

import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hpcinfer.errors import JobDirectoryError, StorageError
from hpcinfer.recovery.digests import BlockDigests
from hpcinfer.recovery.durable import naming, write_all
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.patience import GONE, patiently, read_all
from hpcinfer.recovery.sidecar import void_lines
from hpcinfer.recovery.winners import Winners

log = logging.getLogger(__name__)

_CHUNK_BYTES = 64 << 20  # of the output, put together in memory
_CHUNK_ROWS = 1 << 20  # bounds the bookkeeping where lines are short
_WINDOW_BYTES = 8 << 20  # of a part, read at once
_GAP_BYTES = 64 << 10  # reading over so many bytes costs less than another request

Damaged = dict[str, list[int]]  # offsets of damaged lines, by part


class _Copied(NamedTuple):
    """What came of it."""

    damaged: Damaged
    digests: BlockDigests


def copy_lines(paths: JobPaths, winners: Winners, target: Path, offset: int) -> BlockDigests:
    """Write the lines of a range of rows, one after the other, at `offset` of an existing file; durable on return.

    Not collective.

    Returns:
        Hashes of what was written.

    Raises:
        JobDirectoryError: lines whose checksums are wrong. They count no more, so that the next start computes their
            rows again.
    """
    copied = patiently(lambda: _copy(paths, winners, target, offset), target, errors=GONE)
    if copied.damaged:
        raise _give_up(paths, copied.damaged)
    return copied.digests


def _copy(paths: JobPaths, winners: Winners, target: Path, offset: int) -> _Copied:
    """Write all lines and sync them; after a failure only writing all of them again makes them safe."""
    damaged, digests = Damaged(), BlockDigests(offset)
    descriptor = os.open(target, os.O_RDWR | os.O_CLOEXEC)
    try:
        for rows in _chunks(winners.entries["length"]):
            data = _gather(paths, winners, rows, damaged)
            with naming(target):
                write_all(descriptor, data, offset)
            digests.update(data)
            offset += len(data)
        with naming(target):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return _Copied(damaged, digests)


def _chunks(lengths: np.ndarray) -> Iterator[slice]:
    """Cut rows into runs that are bounded in rows, and in bytes unless a single line is longer."""
    start = 0
    while start < len(lengths):
        ends = np.cumsum(lengths[start:start + _CHUNK_ROWS], dtype=np.int64)
        count = max(int(np.searchsorted(ends, _CHUNK_BYTES, side="right")), 1)
        yield slice(start, start + count)
        start += count


def _gather(paths: JobPaths, winners: Winners, rows: slice, damaged: Damaged) -> bytearray:
    """Put the lines of some consecutive rows together, part by part."""
    entries, part_ids = winners.entries[rows], winners.part_ids[rows]
    ends = np.cumsum(entries["length"], dtype=np.int64)
    starts = ends - entries["length"]
    target = bytearray(int(ends[-1]))
    by_place = np.lexsort((entries["offset"], part_ids))
    by_place = by_place[entries["length"][by_place] > 0]
    for run in _runs(part_ids[by_place]):
        picks = by_place[run]
        part = winners.parts[int(part_ids[picks[0]])]
        offsets = _copy_part(paths.part_data(part), entries[picks], starts[picks], target)
        if offsets:
            damaged.setdefault(part, []).extend(offsets)
    return target


def _runs(values: np.ndarray) -> Iterator[slice]:
    """Cut where the value changes."""
    cuts = np.flatnonzero(values[1:] != values[:-1]) + 1
    bounds = [0, *cuts.tolist(), len(values)] if len(values) else []
    yield from (slice(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False))


def _copy_part(path: Path, entries: np.ndarray, starts: np.ndarray, target: bytearray) -> list[int]:
    """Copy lines of one part, given in order of their offsets; returns the offsets of damaged ones."""
    damaged = []
    offsets = entries["offset"].astype(np.int64)
    ends = offsets + entries["length"]
    is_far = offsets[1:] - ends[:-1] > _GAP_BYTES
    windows = np.concatenate(([0], np.cumsum(is_far))) + offsets // _WINDOW_BYTES
    with path.open("rb", buffering=0) as file:
        for run in _runs(windows):
            base = int(offsets[run.start])
            data = memoryview(read_all(file.fileno(), base, int(ends[run.stop - 1]) - base))
            places = zip((offsets[run] - base).tolist(), entries["length"][run].tolist(), entries["crc"][run].tolist(),
                         starts[run].tolist(), strict=True)
            for offset, length, crc, start in places:
                line = data[offset:offset + length]
                if not _is_whole(line, length, crc):
                    line = _read_anew(path, base + offset, length)
                if _is_whole(line, length, crc):
                    target[start:start + length] = line
                else:
                    damaged.append(base + offset)
    return damaged


def _is_whole(line: memoryview, length: int, crc: int) -> bool:
    return len(line) == length and zlib.crc32(line) == crc


def _read_anew(path: Path, offset: int, length: int) -> memoryview:
    """Read a line past what this node remembers of the file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)
        return memoryview(read_all(descriptor, offset, length))
    finally:
        os.close(descriptor)


def _give_up(paths: JobPaths, damaged: Damaged) -> JobDirectoryError:
    """Record damaged lines, and say so."""
    for part, offsets in damaged.items():
        try:
            void_lines(paths, part, offsets)
        except (OSError, StorageError) as error:  # who may only read: the job's own merge will find the same lines
            log.warning("cannot note that %d lines of %s are damaged: %s", len(offsets), part, error)
    part, offsets = next(iter(damaged.items()))
    return JobDirectoryError(f"{sum(map(len, damaged.values()))} finished lines are not what was written",
                             where=f"{paths.part_data(part)}, byte {offsets[0]}",
                             hint="start the same command again: it computes their rows anew")
