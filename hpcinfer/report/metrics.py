"""Where the time of a run goes, and how often what happened. No clock decides anything here."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Metrics:
    """Seconds by phase and events by name, of one rank."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.counts: Counter[str] = Counter()
        self.peaks: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a block to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def count(self, name: str, amount: int = 1) -> None:
        """Count events."""
        self.counts[name] += amount

    def peak(self, name: str, value: int) -> None:
        """Keep the largest value."""
        self.peaks[name] = max(value, self.peaks.get(name, 0))
