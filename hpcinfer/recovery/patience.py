"""Patience with a file system that is away for some seconds: the same call again, for a bounded time."""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from hpcinfer.errors import StorageError
from hpcinfer.units import format_seconds

log = logging.getLogger(__name__)

LIMIT_S = 60.0  # from the first failure on
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0

# A server that restarts, a network that is down, a client that was evicted. Not: no room, no permission.
AWAY = frozenset({
    errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EAGAIN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED,
    errno.ESHUTDOWN, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO, errno.ECOMM, errno.EBUSY, errno.ENOLCK,
})  # fmt: skip
GONE = AWAY | {errno.ENOENT, errno.ENOTDIR, errno.EROFS}  # the same for a directory that was here a moment ago

T = TypeVar("T")


def patiently(call: Callable[[], T], where: Path, *, errors: frozenset[int] = AWAY,
              stop: threading.Event | None = None) -> T:
    """Call until the file system answers; the log says once that it does not, and once that it does again.

    Not collective.

    Args:
        call: what can be done again from its beginning.
        where: the file, for messages.
        errors: numbers of the system's errors that may pass; all others are raised at once.
        stop: nobody wants to wait any more.

    Raises:
        StorageError: the file system is away for too long.
    """
    outage: _Outage | None = None
    while True:
        try:
            result = call()
        except OSError as error:
            if error.errno not in errors:
                raise
            outage = outage or _Outage(error, where, stop or threading.Event())
            outage.pause(error)
        else:
            if outage:
                outage.end()
            return result


def read_all(descriptor: int, offset: int, size_bytes: int) -> bytes:
    """Read so many bytes, fewer at the end of the file. Not collective."""
    pieces = []
    while size_bytes and (piece := os.pread(descriptor, size_bytes, offset)):
        pieces.append(piece)
        offset, size_bytes = offset + len(piece), size_bytes - len(piece)
    return b"".join(pieces) if len(pieces) != 1 else pieces[0]


class PatientFile:
    """A file that is read by position, and opened anew after the file system was away. Any thread may read."""

    def __init__(self, path: Path) -> None:
        self._path, self._descriptor, self._lock = path, -1, threading.Lock()

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Read so many bytes, fewer at the end of the file. Not collective."""
        return patiently(lambda: self._read(offset, size_bytes), self._path)

    def _read(self, offset: int, size_bytes: int) -> bytes:
        with self._lock:
            if self._descriptor < 0:
                self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return read_all(self._descriptor, offset, size_bytes)
            except OSError:
                self._close()
                raise

    def _close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            with suppress(OSError):
                os.close(descriptor)

    def __del__(self) -> None:
        self._close()


class _Outage:
    """A time in which the file system does not answer."""

    def __init__(self, error: OSError, where: Path, stop: threading.Event) -> None:
        self._where, self._stop = where, stop
        self._start, self._pause_s = time.monotonic(), _FIRST_PAUSE_S
        log.warning("%s: %s; trying again for %s", where, _text(error), format_seconds(LIMIT_S))

    def pause(self, error: OSError) -> None:
        """Wait a little longer than the last time."""
        if self._seconds() > LIMIT_S or self._stop.wait(self._pause_s):
            raise StorageError(f"{_text(error)}, for {format_seconds(self._seconds())}", where=str(self._where),
                               hint="when the file system is back, start the same command again: what was finished "
                                    "is kept") from error
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def end(self) -> None:
        """Say that it is over."""
        log.warning("%s: the file system is back after %s", self._where, format_seconds(self._seconds()))

    def _seconds(self) -> float:
        return time.monotonic() - self._start


def _text(error: OSError) -> str:
    return error.strerror or os.strerror(error.errno or 0)
