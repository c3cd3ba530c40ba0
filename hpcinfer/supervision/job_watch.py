"""The job directory as a supervisor sees it: is it complete, what has a dead step done, what does it hold."""

from __future__ import annotations

import logging
import signal
import time
from pathlib import Path

import numpy as np

from hpcinfer.recovery.attempts import current_attempt
from hpcinfer.recovery.deaths import CRASH, KILLED, NODE_LOST, cause_of, record_death
from hpcinfer.recovery.index import Index
from hpcinfer.recovery.inflight import Left, list_left, read_left
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.leases import Holder, LeaseObserver, read_lease
from hpcinfer.recovery.merging import MergeReport, read_complete
from hpcinfer.recovery.sidecar import ENTRY, IS_ERROR, JournalReader
from hpcinfer.recovery.states import RowStates
from hpcinfer.supervision.base import Burial

log = logging.getLogger(__name__)

_CRASHES = {128 + number for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT, signal.SIGILL)}
_OUTSIDE = {128 + number for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)}


class JobWatch:
    """Reads one job directory, and cleans up after dead steps. Not thread safe."""

    def __init__(self, paths: JobPaths, lease_timeout_s: float) -> None:
        self.paths = paths
        self._leases = LeaseObserver(paths.leases, lease_timeout_s)
        self._states: RowStates | None = None
        self._reader: JournalReader | None = None
        self._attempt = 0
        self._listed: tuple[float, list[str], list[str]] | None = None  # when, replicas that have files, leases
        self._holders: dict[str, Holder | None] = {}  # by lease

    @staticmethod
    def of(output: Path, lease_timeout_s: float) -> JobWatch:
        """Watch the job of an output. Not collective."""
        return JobWatch(JobPaths(output), lease_timeout_s)

    @property
    def num_rows(self) -> int:
        """Rows of the job, as of the last look; 0 before the index is there."""
        return len(self._states.are_finished(slice(None))) if self._states else 0

    @property
    def num_done(self) -> int:
        """Rows that need no more work, as of the last look."""
        return self.num_rows - (self._states.num_unfinished if self._states else 0)

    def is_open(self) -> bool:
        """Whether a step has got so far that others find the index. Not collective."""
        return self.paths.index.exists()

    def is_complete(self) -> bool:
        """Whether every row is finished. Not collective."""
        if not self.is_open():
            return False
        attempt = current_attempt(self.paths)
        if self._states is None or self._reader is None or attempt != self._attempt:
            self._states = RowStates(Index.open(self.paths.index).num_rows, attempt)
            self._reader, self._attempt = JournalReader(self.paths), attempt
        self._states.read_all(self._reader)
        return self._states.num_unfinished == 0

    def merged(self) -> MergeReport | None:
        """Report of the merge, if the output is there. Not collective."""
        return read_complete(self.paths)

    def is_silent(self, step: str) -> bool:
        """Whether a step has shown no sign of life for too long, after it had shown one. Not collective."""
        return any(not self._leases.is_alive(name) for name in self._leases_of(self._left_by(step)))

    def num_in_flight(self, step: str) -> int | None:
        """Rows that a step computes now; None if it has not begun. Not collective."""
        left = self._left_by(step)
        return sum(len(each.rows) for each in left) if left else None

    def bury(self, step: str, exit_code: int, *, is_node_lost: bool) -> Burial:
        """Clean up after a step whose launcher has returned: record its deaths, then release what it claimed.

        Not collective.
        """
        self._listed = None
        left = self._left_by(step)
        leases = self._leases_of(left)
        num_finished = sum(self._num_finished(each.part) for each in left)
        causes = [NODE_LOST if is_node_lost else _cause(each, exit_code) for each in left]
        for each, cause in zip(left, causes, strict=True):
            record_death(self.paths, each, cause)
        for name in leases:
            (self.paths.leases / name).unlink(missing_ok=True)
        is_alone = any(cause == CRASH and len(each.rows) == 1 for each, cause in zip(left, causes, strict=True))
        return Burial(num_finished, is_alone)

    def _left_by(self, step: str) -> list[Left]:
        names = [name for name in self._list()[0] if name.rpartition(".")[0] == step]
        return [left for name in names if (left := read_left(self.paths, name)) is not None]

    def _leases_of(self, left: list[Left]) -> list[str]:
        """Leases whose holder is a leader of the step."""
        holders = [each.holder for each in left]
        return [name for name in self._list()[1] if self._holder(name) in holders] if holders else []

    def _list(self) -> tuple[list[str], list[str]]:
        """Replicas that have files here, and leases; listed at most once a second, since there may be thousands."""
        now = time.monotonic()
        if self._listed is None or now - self._listed[0] > 1.0:
            leases = self._leases.names() if self.paths.leases.exists() else []
            self._listed = now, list_left(self.paths), leases
        return self._listed[1:]

    def _holder(self, lease: str) -> Holder | None:
        if lease not in self._holders:
            try:
                self._holders[lease] = read_lease(self.paths.leases / lease)[1]
            except OSError:
                return None  # ended while we looked
        return self._holders[lease]

    def _num_finished(self, part: str) -> int:
        """Rows of a part that are no errors: a step that makes only errors makes no progress."""
        try:
            data = self.paths.part_sidecar(part).read_bytes()[ENTRY.itemsize :]
        except FileNotFoundError:
            return 0
        entries = np.frombuffer(data, ENTRY, len(data) // ENTRY.itemsize)
        return int(((entries["flags"] & IS_ERROR) == 0).sum())


def _cause(left: Left, exit_code: int) -> str:
    """Why a step died: what its ranks have left counts, unless the launcher has seen a kill from outside come first."""
    if exit_code in _OUTSIDE and cause_of(left) == CRASH:
        return KILLED
    return CRASH if exit_code in _CRASHES else cause_of(left)
