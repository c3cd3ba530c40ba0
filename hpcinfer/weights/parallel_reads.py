"""Requests sent to a file system: several in flight, past the page cache where asked; threads compare checksums."""

import os
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from hpcinfer.weights.requests import Chunk, Request, plan_requests

IN_FLIGHT = 4  # requests at a time
_COMPARING = 2  # threads more, that compare checksums meanwhile
_OPEN_FILES = 8  # descriptors that are kept


class Damage(NamedTuple):
    """Why a unit could not be read."""

    found: str
    expected: str
    hint: str = "convert the model again"


class Outcome(NamedTuple):
    """What came of reading units."""

    num_bytes: int  # asked of the file system
    damages: list[Damage | None]  # of each unit


class ParallelReader:
    """A few threads that read units; several threads may ask it at once. Not collective."""

    def __init__(self) -> None:
        self._files = _OpenFiles()
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._in_flight = threading.Semaphore(IN_FLIGHT)

    def read(self, chunks: Sequence[Chunk], *, direct: bool = False) -> Outcome:
        """Fill the memory of all units and compare their checksums; returns when no thread writes there any more.

        Not collective.

        Args:
            chunks: in any order, from any number of files.
            direct: go past the page cache where memory, offsets and file system allow it.
        """
        requests, work = plan_requests(chunks, direct=direct), _Work(chunks)
        if len(requests) == 1:
            counts = [self._run(requests[0], work, direct=direct)]
        else:
            counts = list(self._threads().map(lambda each: self._run(each, work, direct=direct), requests))
        return Outcome(sum(counts), work.damages)

    def close(self) -> None:
        """Close all files; the next read opens them again. Not collective."""
        self._files.close()

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(IN_FLIGHT + _COMPARING, thread_name_prefix="read")
            return self._pool

    def _run(self, request: Request, work: "_Work", *, direct: bool) -> int:
        try:
            with self._in_flight:
                done = self._fill(request, direct=direct and request.can_be_direct)
        except OSError as error:
            work.fail(request, error)
        else:
            work.add(request, done)
        return request.num_bytes

    def _fill(self, request: Request, *, direct: bool) -> int:
        if direct:
            try:
                return _read_pieces(self._files.get(request.path, os.O_DIRECT), request)
            except OSError:  # a file system that refuses it; what is really wrong, the other way will say
                pass
        return _read_pieces(self._files.get(request.path), request)


class _Work:
    """Units on their way: how much of each is missing, and what is wrong with it."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.damages: list[Damage | None] = [None] * len(chunks)
        self._chunks = chunks
        self._missing = [len(chunk.raw) for chunk in chunks]
        self._ends: dict[int, int] = {}  # of the file, as far as units find out
        self._lock = threading.Lock()

    def add(self, request: Request, done: int) -> None:
        """Take what a request has read; compare the checksums of units that are whole now."""
        end = request.start + done
        for piece in request.pieces:
            count, done = min(done, len(piece.raw)), max(0, done - len(piece.raw))
            if piece.chunk < 0:
                continue
            with self._lock:
                self._missing[piece.chunk] -= count
                is_whole = not self._missing[piece.chunk]
            if is_whole:
                self._compare(piece.chunk)
            elif count < len(piece.raw):
                self._cut_short(piece.chunk, end)

    def fail(self, request: Request, error: OSError) -> None:
        """Say of all units of a request that they cannot be read."""
        reason, verb = error.strerror or str(error), "read" if error.filename is None else "opened any more"
        damage = Damage(f"{request.path.name} cannot be {verb}: {reason}", "all files of the store", "")
        for piece in request.pieces:
            if piece.chunk >= 0:
                self.damages[piece.chunk] = damage

    def _compare(self, index: int) -> None:
        chunk = self._chunks[index]
        checksum = zlib.crc32(chunk.raw)
        if checksum != chunk.checksum:
            self.damages[index] = Damage(
                f"a chunk has the checksum {checksum:08x}",
                f"{chunk.checksum:08x}, as when written",
                "convert the model again; check the disk if it happens twice",
            )

    def _cut_short(self, index: int, end: int) -> None:
        chunk = self._chunks[index]
        with self._lock:  # requests that begin behind the end of the file may come first
            if self.damages[index] is None or index in self._ends:
                end = self._ends[index] = min(end, self._ends.get(index, end))
                found = f"the file ends after {max(0, end - chunk.start)} of {len(chunk.raw)} bytes of a chunk"
                self.damages[index] = Damage(found, "a whole file")


class _Descriptor:
    """An open file; closed when nobody reads it any more."""

    def __init__(self, path: Path, flags: int) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class _OpenFiles:
    """The files that were read last stay open."""

    def __init__(self) -> None:
        self._held: dict[tuple[Path, int], _Descriptor] = {}  # the last one used at the end
        self._lock = threading.Lock()

    def get(self, path: Path, flags: int = 0) -> _Descriptor:
        """Open a file unless it is open; the caller holds the descriptor while it reads."""
        with self._lock:
            found = self._held.pop((path, flags), None)
        found = found or _Descriptor(path, flags)
        with self._lock:
            self._held[path, flags] = found
            if len(self._held) > _OPEN_FILES:
                del self._held[next(iter(self._held))]
        return found

    def close(self) -> None:
        """Let go of all files."""
        with self._lock:
            self._held.clear()


def _read_pieces(file: _Descriptor, request: Request) -> int:
    """Fill the pieces of a request; returns the bytes read, fewer only at the end of the file."""
    buffers, done = [piece.raw for piece in request.pieces if len(piece.raw)], 0
    while buffers:
        count = os.preadv(file.number, buffers, request.start + done)
        if count == 0:
            break
        done += count
        while buffers and count >= len(buffers[0]):
            count -= len(buffers.pop(0))
        if count:
            buffers[0] = buffers[0][count:]
    return done
