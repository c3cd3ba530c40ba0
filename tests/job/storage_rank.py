"""`hpcinfer run`, whose storage or clock is not as it should be, as its first argument says."""

import errno
import io
import itertools
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpcinfer.__main__ import main
from hpcinfer.recovery import journal, patience, sidecar
from hpcinfer.recovery.rows import RowSource
from hpcinfer.recovery.winners import Winners

CALLS = ("open", "write", "pread", "pwrite", "fsync", "link", "replace", "unlink", "mkdir", "listdir", "stat")
NUM_FLUSHES = 3  # that go well; in the next one the entries cannot be written


class Outage:
    """The job directory fails for some seconds; files that were open when it began are of no use any more."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._end, self._stale = seconds, 0.0, set[int]()
        self._seal, self._flushes = journal.seal, itertools.count()
        journal.seal = self._count
        for name in CALLS:
            setattr(os, name, self._failing(getattr(os, name)))
        io.open = self._failing(io.open)  # type: ignore[assignment]
        self._close, os.close = os.close, self._forget

    def _count(self, entries: Any) -> Any:
        if next(self._flushes) == NUM_FLUSHES:
            self._stale = {int(name) for name in os.listdir("/proc/self/fd") if self._is_ours(int(name))}
            self._end = time.monotonic() + self._seconds
        return self._seal(entries)

    def _failing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, *arguments: Any, **options: Any) -> Any:
            if file in self._stale or (time.monotonic() < self._end and self._is_ours(file)):
                raise OSError(errno.EIO, "Input/output error")
            return function(file, *arguments, **options)

        return call

    def _is_ours(self, file: Any) -> bool:
        try:
            return ".job/" in (os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.fsdecode(file))
        except FileNotFoundError:
            return False

    def _forget(self, descriptor: int) -> None:
        self._stale.discard(descriptor)
        self._close(descriptor)


def _stay_away() -> None:
    patience.LIMIT_S = 1.0
    Outage(3600)


def _limit_files() -> None:
    """Let no file grow beyond 2 KiB from the first finished line on."""
    seal = journal.seal

    def limit(entries: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
        return seal(entries)

    journal.seal = limit


def _see_old_sizes() -> None:
    """Let rank 1 see half of each part for two seconds, as another node's cache may."""
    if os.environ.get("OMPI_COMM_WORLD_RANK") != "1":
        return
    times, read, read_entries = list[float](), Winners.read, sidecar._read_entries

    def read_late(winners: Winners, reader: sidecar.JournalReader) -> None:
        times.append(time.monotonic())
        read(winners, reader)

    def see(*arguments: Any) -> Any:
        entries = read_entries(*arguments)
        return entries[:len(entries) // 2] if times and time.monotonic() < times[0] + 2 else entries

    Winners.read, sidecar._read_entries = read_late, see  # type: ignore[method-assign]


def _shift_clock(seconds: float) -> None:
    now = time.time
    time.time = lambda: now() + seconds


def _slow_down(*, in_company: bool) -> None:
    """Give tests time to break something; in company no fourth row is begun before another job has a part."""
    parts = Path(sys.argv[sys.argv.index("--output") + 1] + ".job", "parts")
    prepare, num_rows = RowSource.prepare, itertools.count(1)

    def slowly(source: RowSource, row: int) -> Any:
        is_waiting = next(num_rows) > 3 and in_company
        time.sleep(0.05)
        while is_waiting and len(list(parts.glob("*.sidecar"))) < 2:
            time.sleep(0.05)
        return prepare(source, row)

    RowSource.prepare = slowly  # type: ignore[method-assign]


def _flush_each_line(writer: journal.PartWriter, *arguments: object, **options: object) -> bool:
    writer.flush()
    return True


EVENTS: dict[str, Callable[[], object]] = {
    "away": lambda: Outage(2.0),
    "gone": _stay_away,
    "small files": _limit_files,
    "old sizes": _see_old_sizes,
    "early": lambda: _shift_clock(-1000),
    "late": lambda: _shift_clock(1000),
    "nothing": lambda: None,
    "company": lambda: None,
}
IN_COMPANY = ("early", "late", "company")

if __name__ == "__main__":
    journal.PartWriter.maybe_flush = _flush_each_line  # type: ignore[method-assign, assignment]
    _slow_down(in_company=sys.argv[1] in IN_COMPANY)
    EVENTS[sys.argv[1]]()
    raise SystemExit(main(["run", *sys.argv[2:]]))
