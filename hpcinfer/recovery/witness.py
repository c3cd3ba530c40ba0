"""The witness of a rank: it leaves word of the rows in flight and of why the rank ends, and knows of earlier deaths."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

from hpcinfer.recovery.deaths import Deaths, cause_of, record_death
from hpcinfer.recovery.inflight import HANG, CrashFile, InFlight, read_left, replica_name
from hpcinfer.recovery.layout import JobPaths


class Witness:
    """One per rank. Use as a context manager, around all of the rank's work for the job.

    A replica is known by its number and by the epoch of its members: survivors go on under the next name, and their
    leader records the death that made them so.
    """

    def __init__(self, paths: JobPaths, start: str, attempt: int = 0) -> None:
        """Prepare; nothing is written before `serve`.

        Args:
            paths: of the job.
            start: name of this start, see `inflight.start_name`; the same on all ranks.
            attempt: of the job.
        """
        self._paths, self._start, self._attempt = paths, start, attempt
        self._deaths = Deaths(paths, attempt)
        self._name = ""
        self._crash: CrashFile | None = None
        self._flight: InFlight | None = None

    def serve(self, replica: int, epoch: int, *, part: str = "", rows: Iterable[int] = ()) -> None:
        """Begin to serve, or go on with other members. Not collective; every rank of the replica does it.

        Args:
            replica: its number.
            epoch: of its members; the same on all of them, another one after each death.
            part: of the journal, on the leader; empty on all others.
            rows: that are in flight already, on the leader.
        """
        name, before = replica_name(self._start, f"{replica}-{epoch}"), self._name
        if self._crash is None:
            self._crash = CrashFile(self._paths, name)
        else:
            self._crash.move(name)
        self._name = name
        if part:
            self._lead(before, part, rows)
        elif self._flight is not None:
            self._flight.leave()
            self._flight = None

    def opened(self, row: int) -> None:
        """Note that the engine has got a row. On the leader. Not collective."""
        if self._flight is not None:
            self._flight.opened(row)

    def closed(self, row: int) -> None:
        """Note that a row has left the engine. On the leader. Not collective."""
        if self._flight is not None:
            self._flight.closed(row)

    def hung(self, text: str) -> None:
        """Note that this rank hangs, before it is ended. Not collective; may be called from another thread."""
        if self._crash is not None:
            self._crash.note(f"{HANG}: {text}")

    def refresh(self) -> None:
        """Learn of deaths: rows come whose owner has died. On the leader. Not collective."""
        self._deaths.refresh()

    def must_be_alone(self, row: int) -> bool:
        """Whether a row may only be computed while its replica computes nothing else. Not collective."""
        return self._deaths.must_be_alone(row)

    def is_poison(self, row: int) -> bool:
        """Whether a row is an error, since nobody survives it. Not collective."""
        return self._deaths.is_poison(row)

    def _lead(self, before: str, part: str, rows: Iterable[int]) -> None:
        old, self._flight = self._flight, InFlight(self._paths, self._name, part=part, attempt=self._attempt)
        for row in rows:
            self._flight.opened(row)
        left = read_left(self._paths, before) if before else None
        if left is not None:
            record_death(self._paths, left, cause_of(left))
        if old is not None:
            old.leave()
        self.refresh()

    def __enter__(self) -> Witness:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._crash is not None:
            self._crash.close(error)
        if self._flight is not None:
            self._flight.__exit__(kind)
            self._flight = None
