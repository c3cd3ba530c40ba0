"""From units in files to requests of a file system: neighbours together, large ones cut, memory never copied.

Only arithmetic on byte ranges; hpcinfer.weights.parallel_reads sends the requests.
"""

from collections.abc import Callable, Iterator, Sequence
from mmap import PAGESIZE, mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np

REQUEST_BYTES = 16 << 20  # of a request where neighbours make up so much; below twice that in any case
MAX_GAP = 16 << 10  # bytes between neighbours that are read and dropped: HDF5's metadata, padding to pages
GAP_SHARE = 16  # a gap is at most one part in so many of either neighbour
MAX_PIECES = 512  # of one request; Linux takes 1024 buffers
_DROPPED = memoryview(mmap(-1, MAX_GAP))  # where gaps go; nobody reads it


class Chunk(NamedTuple):
    """One unit in a file."""

    path: Path
    start: int  # byte offset
    raw: memoryview  # to be filled
    checksum: int  # crc32 that it must have

    @property
    def stop(self) -> int:
        """Byte offset behind it."""
        return self.start + len(self.raw)


class Piece(NamedTuple):
    """What one request reads of one unit."""

    chunk: int  # index of the unit; -1: a gap
    raw: memoryview


class Request(NamedTuple):
    """One range of a file, read into several places of memory."""

    path: Path
    start: int  # byte offset
    pieces: tuple[Piece, ...]
    can_be_direct: bool  # offset, lengths and memory are whole pages

    @property
    def num_bytes(self) -> int:
        """Bytes of the range."""
        return sum(len(piece.raw) for piece in self.pieces)


def plan_requests(chunks: Sequence[Chunk], *, direct: bool) -> list[Request]:
    """Cut units into requests, in the order of files and offsets.

    Not collective.

    Args:
        chunks: in any order, from any number of files.
        direct: whether units that may be read past the page cache are kept apart from those that may not.
    """
    order = sorted(range(len(chunks)), key=lambda each: (chunks[each].path, chunks[each].start))
    return [
        request
        for run in _runs(chunks, order, split=direct)
        for request in _cut(chunks[run[0]], list(_pieces(chunks, run)))
    ]


def plain_empty(num_bytes: int) -> np.ndarray:
    """Make uninitialised memory, uint8. Not collective."""
    return np.empty(num_bytes, np.uint8)


def aligned_empty(
    shape: tuple[int, ...], dtype: "np.dtype[np.generic]", allocate: Callable[[int], np.ndarray] = plain_empty
) -> np.ndarray:
    """Make an uninitialised array that begins on a page, so that it can be read past the page cache. Not collective."""
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    room = allocate(num_bytes + PAGESIZE)
    first = -room.ctypes.data % PAGESIZE
    return room[first : first + num_bytes].view(dtype).reshape(shape)


def is_page_aligned(start: int, raw: memoryview) -> bool:
    """Whether a range of a file and the memory for it are whole pages. Not collective."""
    return start % PAGESIZE == 0 and len(raw) % PAGESIZE == 0 and _address(raw) % PAGESIZE == 0


def _address(raw: memoryview) -> int:
    return int(np.frombuffer(raw, np.uint8).ctypes.data) if len(raw) else 0


def _runs(chunks: Sequence[Chunk], order: Sequence[int], *, split: bool) -> list[list[int]]:
    """Units that stand side by side; if `split`, those that are whole pages apart from the others."""
    runs: list[list[int]] = []
    for each in order:
        chunk, last = chunks[each], chunks[runs[-1][-1]] if runs else None
        if last is not None and _are_near(last, chunk) and (not split or _is_paged(last) == _is_paged(chunk)):
            runs[-1].append(each)
        else:
            runs.append([each])
    return runs


def _are_near(last: Chunk, chunk: Chunk) -> bool:
    gap = chunk.start - last.stop
    return last.path == chunk.path and 0 <= gap <= min(MAX_GAP, len(last.raw) // GAP_SHARE, len(chunk.raw) // GAP_SHARE)


def _is_paged(chunk: Chunk) -> bool:
    return is_page_aligned(chunk.start, chunk.raw)


def _pieces(chunks: Sequence[Chunk], run: Sequence[int]) -> Iterator[Piece]:
    """Units of a run and the gaps between them, without an end."""
    stop = chunks[run[0]].start
    for each in run:
        if chunks[each].start > stop:
            yield Piece(-1, _DROPPED[: chunks[each].start - stop])
        yield Piece(each, chunks[each].raw)
        stop = chunks[each].stop


def _cut(first: Chunk, pieces: list[Piece]) -> Iterator[Request]:
    """Cut a run into requests of about one size, at whole pages."""
    total = sum(len(piece.raw) for piece in pieces)
    count = max(1, total // REQUEST_BYTES)
    size = -(-total // (count * PAGESIZE)) * PAGESIZE
    start, held, room = first.start, list[Piece](), size
    for piece in pieces:
        raw = piece.raw
        while True:
            part = raw[:room]
            held.append(Piece(piece.chunk, part))
            raw, room = raw[len(part) :], room - len(part)
            if not room or len(held) == MAX_PIECES:
                yield _request(first.path, start, held)
                start, held, room = start + sum(len(each.raw) for each in held), [], size
            if not raw:
                break
    if held:
        yield _request(first.path, start, held)


def _request(path: Path, start: int, pieces: list[Piece]) -> Request:
    offsets, offset = [], start
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece.raw)
    paged = all(is_page_aligned(at, piece.raw) for at, piece in zip(offsets, pieces, strict=True))
    return Request(path, start, tuple(pieces), paged)
