"""Rows on their way to the engine: read by their offset, and prepared in a thread, ahead of need."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue, SimpleQueue
from types import TracebackType
from typing import BinaryIO, NamedTuple

from hpcinfer.data.completion import error_record
from hpcinfer.data.prepare import Preparer
from hpcinfer.data.request import Prepared
from hpcinfer.errors import JobDirectoryError, RequestError
from hpcinfer.recovery.dealing import Deal
from hpcinfer.recovery.index import Index
from hpcinfer.recovery.patience import patiently
from hpcinfer.recovery.scan import content_hash
from hpcinfer.recovery.snapshots import Outputs, Snapshots

log = logging.getLogger(__name__)


class Refused(NamedTuple):
    """A row that cannot be served."""

    error: RequestError
    record: bytes  # the line that says so


class Row(NamedTuple):
    """A row that was read and prepared."""

    row: int
    deal: Deal  # of its block
    content: Prepared | Refused
    resumed: Outputs = ()  # what an earlier start has made of it


@dataclass(frozen=True)
class RowSource:
    """Where rows are read and how they are prepared and answered."""

    file: BinaryIO  # the plain input
    index: Index
    preparer: Preparer
    model_name: str
    snapshots: Snapshots | None = None

    def read(self, row: int) -> bytes:
        """Read one row. Not collective.

        Raises:
            JobDirectoryError: it is not what it was when the index was built.
        """
        offset, length = self.index.span(row)
        line = patiently(lambda: os.pread(self.file.fileno(), length, offset), Path(self.file.name))
        if content_hash(line) != self.index.content_hash(row):
            raise JobDirectoryError(
                f"row {row} of the input has changed",
                expected="the same input as when the job started",
                where=f"{self.file.name}, byte {offset}",
                hint="restore the input, or start a new job with another --output",
            )
        return line

    def prepare(self, row: int) -> Prepared | Refused:
        """Read and prepare one row; a bug of ours costs that row, not the job. Not collective.

        Raises:
            JobDirectoryError: it is not what it was when the index was built.
        """
        line = self.read(row)
        try:
            return self.preparer.prepare(row, line)
        except RequestError as error:
            found = error
        except Exception as error:
            log.exception("row %d: this is a bug of hpcinfer; the row becomes an error record", row)
            found = RequestError("internal_error", f"{type(error).__name__} while the row was prepared")
        return Refused(found, error_record(row, line, found, self.preparer.kind))

    def refuse(self, row: int, error: RequestError) -> Refused:
        """Make the record of a row that is not served, whatever it asks for. Not collective."""
        return Refused(error, error_record(row, self.read(row), error, self.preparer.kind))

    def resumed(self, row: int, block: int) -> Outputs:
        """Output tokens that a row has already, by choice; () if it begins anew. Not collective."""
        return self.snapshots.resumed(row, block) if self.snapshots else ()


class PrepareAhead:
    """Prepares rows in a thread, in order."""

    def __init__(self, source: RowSource) -> None:
        self._source = source
        self._wanted: SimpleQueue[tuple[int, Deal] | None] = SimpleQueue()
        # A SimpleQueue waits for ever where a signal comes at the end of a time limit (CPython 3.11).
        self._done: Queue[Row | BaseException] = Queue()
        self._waited_for: deque[Row | BaseException] = deque()  # taken out of `_done` by `wait`
        self._is_closed = threading.Event()
        self.num_open = 0  # rows that were given and not taken back
        self._thread = threading.Thread(target=self._run, name="rows", daemon=True)
        self._thread.start()

    def give(self, row: int, deal: Deal) -> None:
        """Prepare one more row. Not collective."""
        self._wanted.put((row, deal))
        self.num_open += 1

    def take(self) -> Row | None:
        """Next row, or None if it is not ready. Not collective.

        Raises:
            JobDirectoryError: a row that is not what it was when the index was built.
        """
        try:
            ready = self._waited_for.popleft() if self._waited_for else self._done.get_nowait()
        except Empty:
            return None
        if isinstance(ready, BaseException):
            raise ready
        self.num_open -= 1
        return ready

    def wait(self, timeout_s: float) -> None:
        """Wait until a row is ready, but not for ever. Not collective."""
        if not self._waited_for:
            try:
                self._waited_for.append(self._done.get(timeout=timeout_s))
            except Empty:
                return

    def _run(self) -> None:
        while (given := self._wanted.get()) is not None and not self._is_closed.is_set():
            try:
                row, deal = given
                self._done.put(Row(row, deal, self._source.prepare(row), self._source.resumed(row, deal.block)))
            except BaseException as error:  # raised again where the rows are taken
                self._done.put(error)

    def __enter__(self) -> PrepareAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_closed.set()
        self._wanted.put(None)
        self._thread.join()
