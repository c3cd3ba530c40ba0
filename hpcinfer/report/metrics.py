"""Where the time of a run goes, how often what happened, and what is done now. No clock decides anything here."""

import time
from collections import Counter
from contextlib import AbstractContextManager

from hpcinfer.report.timeline import Timeline

IDLE = "waiting for work"  # a phase in which a rank has nothing to do until another one gives it something
WEIGHTS = "waiting for weights"  # a phase that begins anew with every part that comes, inside of computing
STAGING = "writing the stage"  # a phase in which what was read is written to the node's own disk
SPARE = "waiting as a spare"  # a phase in which a rank has nothing to do until another one has died


class Metrics:
    """Seconds by phase and events by name, of one rank.

    `place` and `moves` may be read from another thread.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.counts: Counter[str] = Counter()
        self.peaks: dict[str, int] = {}
        self.timeline = Timeline()
        self.place = ""  # the innermost phase that has begun and not ended
        self.moves = 0  # phases that have begun so far

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Add the time of a block to a phase, and say meanwhile that this rank is in it."""
        return _Phase(self, name)

    def count(self, name: str, amount: int = 1) -> None:
        """Count events."""
        self.counts[name] += amount

    def peak(self, name: str, value: int) -> None:
        """Keep the largest value."""
        self.peaks[name] = max(value, self.peaks.get(name, 0))


class _Phase:
    """One stay in a phase. A class, since it costs half of what a generator does on the path of every step."""

    __slots__ = ("_metrics", "_name", "_outer", "_start")

    def __init__(self, metrics: Metrics, name: str) -> None:
        self._metrics, self._name = metrics, name

    def __enter__(self) -> None:
        metrics = self._metrics
        self._outer, metrics.place = metrics.place, self._name
        metrics.moves += 1
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        metrics, name = self._metrics, self._name
        metrics.seconds[name] = metrics.seconds.get(name, 0.0) + time.perf_counter() - self._start
        metrics.place = self._outer
