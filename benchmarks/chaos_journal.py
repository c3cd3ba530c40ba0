"""What the journal of a job holds over time, as an onlooker sees it: which rows are finished, and which twice."""

import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.sidecar import JournalReader

_INTERVAL_S = 0.05


class Again(NamedTuple):
    """Rows that the journal has more than once."""

    num_again: int  # finished before a fault, computed once more after it
    num_overlaps: int  # two owners worked on them at the same time


class JournalWatch:
    """Reads what is new in the journal every 50 ms, and when asked."""

    def __init__(self, paths: JobPaths, tokens: Sequence[int]) -> None:
        """Begin to look; `tokens` are the output tokens of each row."""
        self._paths, self._reader, self._tokens = paths, JournalReader(paths), np.array(tokens)
        self._times: list[list[float]] = [[] for _ in tokens]  # of each row: when its lines were first seen
        self._growth: list[tuple[float, int]] = []  # when, and how many output tokens were new
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal watch", daemon=True)
        self._thread.start()

    @property
    def num_finished(self) -> int:
        """Rows with a line, as of now."""
        self.look()
        return sum(map(bool, self._times))

    @property
    def growth(self) -> list[tuple[float, int]]:
        """Times (of the clock) at which output tokens became durable, and how many; no token counts twice."""
        return list(self._growth)

    def look(self) -> None:
        """Read what is new."""
        with self._lock:
            if not self._paths.parts.is_dir():
                return
            rows = [row for part in self._reader.read() for row in part.entries["row"].tolist()]
            now = time.time()
            new = {row for row in rows if not self._times[row]}
            for row in rows:
                self._times[row].append(now)
            if new:
                self._growth.append((now, int(self._tokens[sorted(new)].sum())))

    def first_after(self, moment: float) -> float | None:
        """When the first line became durable behind a moment."""
        return next((when for when, _ in self._growth if when > moment), None)

    def again(self, faults: Sequence[float], damaged: set[int]) -> Again:
        """Count rows with several lines, without those whose line somebody has damaged."""
        several = [times for row, times in enumerate(self._times) if len(times) > 1 and row not in damaged]
        num_again = sum(any(times[0] <= fault < times[-1] for fault in faults) for times in several)
        return Again(num_again, len(several) - num_again)

    def close(self) -> None:
        """Look once more, and stop."""
        self._stop.set()
        self._thread.join()
        self.look()

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self.look()
