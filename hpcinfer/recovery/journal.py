"""The writing end of the journal: one part file per incarnation of a replica, and its sidecar."""

import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from hpcinfer.errors import JobDirectoryError
from hpcinfer.recovery.durable import create, sync_directory, write_all
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.sidecar import ENTRY, IS_ERROR, header, seal

FLUSH_INTERVAL_S = 5.0
_MAX_PENDING_BYTES = 8 << 20
_HINT = "make room (df, quota), then start the same command again: what was finished before is kept"


class PartWriter:
    """Appends finished lines. A line is finished when `flush` has returned: data first, then its sidecar entry.

    After a failure nobody knows what the files hold: the writer stores nothing more, and the job must be started again.
    """

    def __init__(self, paths: JobPaths, part: str, attempt: int = 0) -> None:
        """Create the part's files; `part` must be new (see `leases.incarnation_name`)."""
        self.part, self._attempt, self._path = part, attempt, paths.part_data(part)
        with _naming(self._path):
            self._data = create(self._path)
            self._sidecar = create(paths.part_sidecar(part))
            write_all(self._sidecar, header())
            sync_directory(paths.parts)
        self._is_broken = False
        self._lines: list[bytes] = []
        self._entries: list[tuple[int, int, int, int, int, int, int, int]] = []
        self._end = self._flushed_end = 0  # bytes of the data file, with and without pending lines
        self._last_flush = time.monotonic()

    def append(self, row: int, generation: int, line: bytes, *, is_error: bool = False) -> None:
        """Add the line of a row, without its newline; it is pending until the next flush. Not collective."""
        assert b"\n" not in line, f"{row = } has a newline in its line"
        line += b"\n"
        flags = IS_ERROR if is_error else 0
        self._entries.append((row, self._end, len(line), zlib.crc32(line), generation, self._attempt, flags, 0))
        self._lines.append(line)
        self._end += len(line)
        if self._end - self._flushed_end >= _MAX_PENDING_BYTES:
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
        self._is_broken = True  # until all four steps have worked
        with _naming(self._path):
            write_all(self._data, b"".join(self._lines))
            os.fsync(self._data)
            write_all(self._sidecar, seal(np.array(self._entries, ENTRY)).tobytes())
            os.fsync(self._sidecar)
        self._is_broken = False
        self._lines, self._entries, self._flushed_end = [], [], self._end

    def close(self) -> None:
        """Flush, unless that has failed before, and close. Not collective."""
        try:
            if not self._is_broken:
                self.flush()
        finally:
            self._close_files()

    def _close_files(self) -> None:
        os.close(self._data)
        os.close(self._sidecar)

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self._close_files()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which file failed; an error of a descriptor does not."""
    try:
        yield
    except OSError as error:
        raise JobDirectoryError(f"finished lines cannot be stored: {error.strerror or error}", where=str(path),
                                hint=_HINT) from error
