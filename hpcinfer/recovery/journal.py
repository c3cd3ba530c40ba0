"""The writing end of the journal: the part files of one incarnation of a replica, and their sidecars."""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np

from hpcinfer.errors import JobDirectoryError
from hpcinfer.recovery.durable import close_quietly, create, sync_directory, write_all
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.patience import GONE, patiently
from hpcinfer.recovery.sidecar import ENTRY, IS_ERROR, header, seal

FLUSH_INTERVAL_S = 5.0
_MAX_PENDING_BYTES = 8 << 20
_HINT = ("make room (df, quota, ulimit -f) or mend the permissions, then start the same command again: what was "
         "finished before is kept")


class PartWriter:
    """Appends finished lines. A line is finished when `flush` has returned: data first, then its sidecar entry.

    After a failure nobody knows what the files hold, and a sync that is repeated may say that all is well. If the
    file system is only away for some seconds, the lines that were not confirmed are all written again, into a new part;
    else the writer stores nothing more, and the job must be started again.
    """

    def __init__(self, paths: JobPaths, part: str, attempt: int = 0) -> None:
        """Create the first part's files; `part` must be new (see `leases.incarnation_name`)."""
        self._paths, self._name, self._attempt = paths, part, attempt
        self._path = paths.part_data(part)
        self._num_parts = 0
        self._part: _Part | None = None
        self._stop = threading.Event()
        self._is_broken = False
        self._lines: list[bytes] = []
        self._entries: list[tuple[int, int, int, int, int, int, int, int]] = []
        self._pending_bytes = 0
        self._last_flush = time.monotonic()
        self._patiently(self._open)

    def append(self, row: int, generation: int, line: bytes, *, is_error: bool = False) -> None:
        """Add the line of a row, without its newline; it is pending until the next flush. Not collective."""
        assert b"\n" not in line, f"{row = } has a newline in its line"
        line += b"\n"
        flags = IS_ERROR if is_error else 0
        place = self._pending_bytes, len(line)
        self._entries.append((row, *place, zlib.crc32(line), generation, self._attempt, flags, 0))
        self._lines.append(line)
        self._pending_bytes += len(line)
        if self._pending_bytes >= _MAX_PENDING_BYTES:
            self.flush()

    def maybe_flush(self, now: float | None = None, interval_s: float = FLUSH_INTERVAL_S) -> bool:
        """Flush if the last time is more than `interval_s` ago; `now` is `time.monotonic()`. Not collective.

        Returns:
            Whether nothing is pending any more.
        """
        now = time.monotonic() if now is None else now
        if self._lines and now - self._last_flush >= interval_s:
            self.flush()
        return not self._lines

    def flush(self) -> None:
        """Make all lines durable, then their entries. Not collective.

        Raises:
            JobDirectoryError: the lines cannot be stored, now or in an earlier call.
        """
        if self._is_broken:
            raise JobDirectoryError("finished lines could not be stored before", where=str(self._path), hint=_HINT)
        self._last_flush = time.monotonic()
        if not self._lines:
            return
        self._is_broken = True  # until all has worked
        self._patiently(self._store)
        self._is_broken = False
        self._lines, self._entries, self._pending_bytes = [], [], 0

    def give_up(self) -> None:
        """Wait no longer for a file system that is away; from any thread. Not collective."""
        self._stop.set()

    def close(self) -> None:
        """Flush, unless that has failed before, and close. Not collective."""
        try:
            if not self._is_broken:
                self.flush()
        finally:
            self._leave_part()

    def _patiently(self, call: Callable[[], None]) -> None:
        try:
            patiently(call, self._path, errors=GONE, stop=self._stop)
        except OSError as error:
            raise JobDirectoryError(f"finished lines cannot be stored: {error.strerror or error}",
                                    where=str(self._path), hint=_HINT) from error

    def _open(self) -> None:
        self._num_parts += 1
        name = self._name if self._num_parts == 1 else f"{self._name}-{self._num_parts}"
        self._path = self._paths.part_data(name)
        self._part = _Part(self._paths, name)

    def _store(self) -> None:
        if self._part is None:
            self._open()
        assert self._part is not None
        try:
            self._part.store(b"".join(self._lines), np.array(self._entries, ENTRY))
        except BaseException:
            self._leave_part()
            raise

    def _leave_part(self) -> None:
        if self._part is not None:
            self._part.close()
        self._part = None

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self._leave_part()


class _Part:
    """The two open files of a part."""

    def __init__(self, paths: JobPaths, name: str) -> None:
        with ExitStack() as stack:
            self._data = create(paths.part_data(name))
            stack.callback(close_quietly, self._data)
            self._sidecar = create(paths.part_sidecar(name))
            stack.callback(close_quietly, self._sidecar)
            write_all(self._sidecar, header(os.fstat(self._sidecar).st_mtime))
            sync_directory(paths.parts)
            self._files = stack.pop_all()
        self._end = 0  # bytes of the data file

    def store(self, data: bytes, entries: np.ndarray) -> None:
        """Make lines durable, then their entries, whose offsets are those in `data`."""
        entries["offset"] += np.uint64(self._end)
        write_all(self._data, data)
        os.fsync(self._data)
        write_all(self._sidecar, seal(entries).tobytes())
        os.fsync(self._sidecar)
        self._end += len(data)

    def close(self) -> None:
        """Close both files."""
        self._files.close()
