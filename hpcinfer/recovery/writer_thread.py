"""The thread in which finished lines are stored: the loop of the engine never waits for a disk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from queue import Empty, Queue
from types import TracebackType

from hpcinfer.recovery.journal import FLUSH_INTERVAL_S, PartWriter

_MAX_WAITING = 4096  # calls; a disk that is slower than that for long makes the engine wait
_POLL_S = 0.5


class WriterThread:
    """Calls a part writer in the order of its own calls, and flushes it every few seconds.

    A line is finished when the part writer has flushed it, as ever. After an error nothing more is stored, and the
    next call, or the end, raises the error. While the thread runs nobody else may use the part writer.
    """

    def __init__(self, writer: PartWriter, interval_s: float = FLUSH_INTERVAL_S) -> None:
        self._writer, self._interval_s = writer, interval_s
        self._calls: Queue[Callable[[], object] | None] = Queue(_MAX_WAITING)
        self._error: BaseException | None = None
        self._will_flush = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def append(self, row: int, generation: int, line: bytes, *, is_error: bool = False) -> None:
        """Store the line of a row soon. Not collective."""
        self._call(partial(self._writer.append, row, generation, line, is_error=is_error))

    def maybe_flush(self, interval_s: float) -> None:
        """Flush soon if the last time is more than `interval_s` ago. Not collective."""
        self._call(partial(self._writer.maybe_flush, interval_s=interval_s))

    def flush(self) -> None:
        """Flush soon what was appended so far; once is enough while it has not happened. Not collective."""
        if not self._will_flush.is_set():
            self._will_flush.set()
            self._call(self._flush)

    def flush_now(self) -> None:
        """Return when all that was appended so far is durable. Not collective.

        Raises:
            JobDirectoryError: the lines cannot be stored.
        """
        is_done = threading.Event()
        self._call(self._writer.flush)
        self._call(is_done.set)
        while not is_done.wait(_POLL_S):
            self.check()

    def check(self) -> None:
        """Raise the error that has ended the thread's work, if there is one. Not collective.

        Raises:
            JobDirectoryError: the lines cannot be stored.
        """
        if self._error is not None:
            raise self._error

    def _flush(self) -> None:
        self._will_flush.clear()
        self._writer.flush()

    def _call(self, call: Callable[[], object]) -> None:
        self.check()
        self._calls.put(call)

    def _run(self) -> None:
        """After an error go on taking calls, so that nobody waits for room in the queue."""
        is_open = True
        while is_open:
            try:
                call = self._calls.get(timeout=_POLL_S)
                is_open = call is not None
            except Empty:
                call = None
            if self._error is None:
                self._store(call)

    def _store(self, call: Callable[[], object] | None) -> None:
        try:
            if call is not None:
                call()
            self._writer.maybe_flush(interval_s=self._interval_s)
        except BaseException as error:  # raised again in the loop
            self._error = error

    def __enter__(self) -> WriterThread:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the thread; the part writer's own end flushes the rest, unless the loop has failed."""
        if error is not None:
            self._error = self._error or error
            self._writer.give_up()
        self._calls.put(None)
        self._thread.join()
        if error is None:
            self.check()
