"""How fast steps follow one another over the time of a run, in so few numbers that a report can hold them.

A stall of one replica, and that the others have none, can be seen here.
"""

from __future__ import annotations

import time
from typing import Any

_MOST_INTERVALS = 512  # then two become one


class Timeline:
    """Steps, tokens and the longest step in each interval of a run."""

    def __init__(self, interval_s: float = 0.25) -> None:
        self._interval_s, self._start = interval_s, time.time()
        self._steps: list[int] = []
        self._tokens: list[int] = []
        self._longest_s: list[float] = []
        self._last: float | None = None

    def step(self, num_tokens: int, now: float | None = None) -> None:
        """A step has ended, and the next one begins.

        Args:
            num_tokens: that it gave.
            now: seconds since the epoch.
        """
        now = time.time() if now is None else now
        took = 0.0 if self._last is None else now - self._last
        self._last = now
        i = self._interval(now)
        self._steps[i] += 1
        self._tokens[i] += num_tokens
        self._longest_s[i] = max(self._longest_s[i], took)

    def pause(self) -> None:
        """Nothing is to be done: the time until the next step is no step's."""
        self._last = None

    def to_json(self) -> dict[str, Any]:
        """All intervals, as JSON values."""
        return {"start_time": self._start, "interval_s": self._interval_s, "steps": self._steps,
                "tokens": self._tokens, "longest_s": [round(each, 6) for each in self._longest_s]}  # fmt: skip

    def _interval(self, now: float) -> int:
        """The interval of a moment; makes room for it."""
        i = max(0, int((now - self._start) / self._interval_s))
        while i >= _MOST_INTERVALS:
            self._steps, self._tokens = _pairs(self._steps, sum), _pairs(self._tokens, sum)
            self._longest_s = _pairs(self._longest_s, max)
            self._interval_s *= 2
            i //= 2
        missing = i + 1 - len(self._steps)
        if missing > 0:
            self._steps += [0] * missing
            self._tokens += [0] * missing
            self._longest_s += [0.0] * missing
        return i


def _pairs(values: list[Any], join: Any) -> list[Any]:
    return [join(values[i : i + 2]) for i in range(0, len(values), 2)]
