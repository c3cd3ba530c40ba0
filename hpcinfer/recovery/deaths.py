"""Deaths of replicas, counted by row, so that a row that kills ranks ends as an error record and not the whole job.

A death is recorded once, by whoever sees it first: the supervisor, the survivors, or another start of the job.
Kills from outside and lost nodes say nothing of the rows in flight: they never make an error of one.
"""

from __future__ import annotations

import json
import logging
import os
from typing import NamedTuple

from hpcinfer.errors import RequestError
from hpcinfer.recovery.durable import create, publish_bytes, temporary_path
from hpcinfer.recovery.inflight import HANG, Left, list_left, read_left, remove
from hpcinfer.recovery.layout import JobPaths

log = logging.getLogger(__name__)

CRASH, HUNG, KILLED, NODE_LOST = "rank died", "hang", "outside kill", "node lost"
ALONE_AFTER = 2  # deaths of any kind, then it is computed alone: who runs out of memory is killed from outside too
POISON_AFTER = 3  # deaths alone that may be the row's fault, then it is an error

_GIST_LINES = 6
_SETTLED_S = 60.0  # a crash file that nobody wrote to for so long belongs to a replica that is gone


class Death(NamedTuple):
    """What was in flight when a replica died, and why it died."""

    rows: tuple[int, ...]
    alone: bool  # one row was in flight, nothing else
    cause: str
    attempt: int
    host: str = ""  # of the leader
    crash: str = ""  # the first lines that the rank has left

    @property
    def may_be_the_rows_fault(self) -> bool:
        """Neither a lost node nor a kill from outside."""
        return self.cause in (CRASH, HUNG)


class _Count(NamedTuple):
    """Deaths with a row in flight."""

    all: int = 0
    own_alone: int = 0  # that may be the row's fault, while nothing else was in flight

    def plus(self, death: Death) -> _Count:
        """Count one more."""
        return _Count(self.all + 1, self.own_alone + (death.may_be_the_rows_fault and death.alone))


class Deaths:
    """The deaths of an attempt of a job, by row. Not thread safe."""

    def __init__(self, paths: JobPaths, attempt: int = 0) -> None:
        self._paths, self._attempt = paths, attempt
        self._seen: set[str] = set()
        self._counts: dict[int, _Count] = {}

    @staticmethod
    def read(paths: JobPaths, attempt: int = 0) -> Deaths:
        """Read all that is recorded, after the dead that nobody has recorded yet. Not collective."""
        deaths = Deaths(paths, attempt)
        deaths.refresh()
        return deaths

    def refresh(self) -> None:
        """Record replicas that are surely dead, and read what is new. Not collective."""
        for left in find_dead(self._paths):
            record_death(self._paths, left, cause_of(left))
        for name in _list_records(self._paths):
            if name not in self._seen and (death := _read(self._paths, name)) is not None:
                self._seen.add(name)
                self._count(death)

    def must_be_alone(self, row: int) -> bool:
        """Whether a row may only be computed while its replica computes nothing else. Not collective."""
        return self._counts.get(row, _Count()).all >= ALONE_AFTER

    def is_poison(self, row: int) -> bool:
        """Whether a row is an error, since nobody survives it. Not collective."""
        return self._counts.get(row, _Count()).own_alone >= POISON_AFTER

    def _count(self, death: Death) -> None:
        if death.attempt == self._attempt:
            for row in death.rows:
                self._counts[row] = self._counts.get(row, _Count()).plus(death)


def poison_error() -> RequestError:
    """Say why a poison row is an error, in the same words in every run. Not collective."""
    return RequestError("row_kills_ranks", f"a rank died {POISON_AFTER} times while it computed this row alone")


def cause_of(left: Left) -> str:
    """Tell from what a dead replica has left why it died. Not collective."""
    if not left.crash:
        return KILLED
    return HUNG if left.crash.startswith(HANG) else CRASH


def record_death(paths: JobPaths, left: Left, cause: str) -> bool:
    """Record the death of a whole replica, or of its leader, unless somebody has; its files are removed.

    Not collective.

    Args:
        paths: of the job.
        left: what it had in flight, see `read_left`.
        cause: CRASH, HUNG, KILLED or NODE_LOST.

    Returns:
        Whether this call has recorded it; False too if nothing was in flight.
    """
    is_first = False
    if left.rows:
        paths.deaths.mkdir(exist_ok=True)
        death = Death(left.rows, len(left.rows) == 1, cause, left.attempt, left.holder.host, left.crash)
        is_first = publish_bytes(paths.death(left.name), json.dumps(death._asdict()).encode(), sync=False)
    remove(paths, left.name)
    if is_first:
        log.warning("a rank of the replica on %s died with %d rows in flight (%s)%s", left.holder.host,
                    len(left.rows), cause, f":\n{_gist(left.crash)}" if left.crash else "")  # fmt: skip
    return is_first


def _gist(crash: str) -> str:
    """The lines of a crash file that say most: what happened, and where the thread was that it happened to."""
    what, _, rest = crash.strip().partition("\n")
    _, is_signal, frames = rest.partition("Current thread")
    if not is_signal:
        return "\n".join(crash.strip().splitlines()[-_GIST_LINES:])
    return "\n".join([what, *frames.partition("\n\n")[0].splitlines()[1 : _GIST_LINES]])


def find_dead(paths: JobPaths) -> list[Left]:
    """List replicas that are surely dead and not recorded yet. Not collective.

    Their leader was on this host and is gone, or they have crashed a while ago. Those that were killed with their
    node are seen by their supervisor alone.
    """
    found = [left for name in list_left(paths) if (left := read_left(paths, name)) is not None]
    now = _file_system_time(paths) if any(left.crash for left in found) else 0.0
    return [left for left in found if left.holder.is_gone() or (left.crash and _is_settled(paths, left, now))]


def _file_system_time(paths: JobPaths) -> float:
    """What a file gets that is written now: times of other nodes are never compared with our clock."""
    probe = temporary_path(paths.inflight)
    os.close(create(probe))
    now = probe.stat().st_mtime
    probe.unlink()
    return now


def _is_settled(paths: JobPaths, left: Left, now: float) -> bool:
    try:
        return now - paths.inflight_crash(left.name).stat().st_mtime > _SETTLED_S
    except FileNotFoundError:
        return False  # recorded, or forgotten by survivors


def _list_records(paths: JobPaths) -> list[str]:
    try:
        names = os.listdir(paths.deaths)
    except FileNotFoundError:
        return []  # nobody has died
    return sorted(name.removesuffix(".json") for name in names if not name.startswith("."))


def _read(paths: JobPaths, name: str) -> Death | None:
    """Read a record; None if it cannot be read, so that a damaged one counts for nothing."""
    try:
        values = json.loads(paths.death(name).read_bytes())
        return Death(**{**values, "rows": tuple(map(int, values["rows"]))})
    except (OSError, ValueError, LookupError, TypeError):
        return None
