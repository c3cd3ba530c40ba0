"""The writing end of the journal: one part file per incarnation of a replica, and its sidecar."""

import os
import time
import zlib

import numpy as np

from hpcinfer.recovery.durable import create, sync_directory, write_all
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.sidecar import ENTRY, IS_ERROR, header, seal

FLUSH_INTERVAL_S = 5.0
_MAX_PENDING_BYTES = 8 << 20


class PartWriter:
    """Appends finished lines. A line is finished when `flush` has returned: data first, then its sidecar entry."""

    def __init__(self, paths: JobPaths, part: str, attempt: int = 0) -> None:
        """Create the part's files; `part` must be new (see `leases.incarnation_name`)."""
        self.part, self._attempt = part, attempt
        self._data = create(paths.part_data(part))
        self._sidecar = create(paths.part_sidecar(part))
        write_all(self._sidecar, header())
        sync_directory(paths.parts)
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

    @property
    def num_pending(self) -> int:
        """Lines that a kill would lose."""
        return len(self._lines)

    def maybe_flush(self, now: float | None = None) -> bool:
        """Flush if the last time is more than 5 s ago; `now` is `time.monotonic()`. Not collective.

        Returns:
            Whether nothing is pending any more.
        """
        now = time.monotonic() if now is None else now
        if self._lines and now - self._last_flush >= FLUSH_INTERVAL_S:
            self.flush()
        return not self._lines

    def flush(self) -> None:
        """Make all lines durable, then their entries. Not collective."""
        self._last_flush = time.monotonic()
        if not self._lines:
            return
        write_all(self._data, b"".join(self._lines))
        os.fsync(self._data)
        write_all(self._sidecar, seal(np.array(self._entries, ENTRY)).tobytes())
        os.fsync(self._sidecar)
        self._lines, self._entries, self._flushed_end = [], [], self._end

    def close(self) -> None:
        """Flush and close. Not collective."""
        self.flush()
        os.close(self._data)
        os.close(self._sidecar)

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
