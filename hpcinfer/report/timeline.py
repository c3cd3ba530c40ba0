"""How fast steps follow one another over the time of a run, in so few numbers that a report can hold them.

A stall of one replica, and that the others have none, can be seen here; how full batches and the KV cache were, too.
"""

from __future__ import annotations

import time
from typing import Any

from hpcinfer.report.startup import FIRST_TOKEN, STARTUP

_MOST_INTERVALS = 512  # then two become one


class Timeline:
    """Steps, tokens, the longest step, batches and KV blocks in each interval of a run."""

    def __init__(self, interval_s: float = 0.25) -> None:
        self._interval_s, self._start = interval_s, time.time()
        self._steps: list[int] = []
        self._tokens: list[int] = []
        self._longest_s: list[float] = []
        self._sequences: list[int] = []
        self._batch_tokens: list[int] = []
        self._blocks: list[int] = []
        self._last: float | None = None
        self._last_step = 0.0  # seconds since the epoch; 0 before the first
        self.num_steps = self.num_tokens = self.num_sequences = 0  # so far; may be read from another thread

    def step(self, num_tokens: int, sequences: int = 0, batch_tokens: int = 0, blocks: int = 0,
             now: float | None = None) -> None:
        """A step has ended, and the next one begins.

        Args:
            num_tokens: that it gave.
            sequences: of the batch that was computed meanwhile.
            batch_tokens: of that batch.
            blocks: of the KV cache that are held.
            now: seconds since the epoch.
        """
        if self._last_step == 0.0:
            STARTUP.mark(FIRST_TOKEN)
        now = time.time() if now is None else now
        took = 0.0 if self._last is None else now - self._last
        self._last = self._last_step = now
        i = int((now - self._start) / self._interval_s)
        if not 0 <= i < len(self._steps):
            i = self._interval(now)
        self._steps[i] += 1
        self._tokens[i] += num_tokens
        self._sequences[i] += sequences
        self._batch_tokens[i] += batch_tokens
        self.num_steps += 1
        self.num_tokens += num_tokens
        self.num_sequences += sequences
        if took > self._longest_s[i]:
            self._longest_s[i] = took
        if blocks > self._blocks[i]:
            self._blocks[i] = blocks

    def pause(self) -> None:
        """Nothing is to be done: the time until the next step is no step's."""
        self._last = None

    def to_json(self) -> dict[str, Any]:
        """All intervals, as JSON values."""
        return {"start_time": self._start, "interval_s": self._interval_s, "last_step_time": self._last_step,
                "steps": self._steps, "tokens": self._tokens, "longest_s": [round(each, 6) for each in self._longest_s],
                "sequences": self._sequences, "batch_tokens": self._batch_tokens, "blocks": self._blocks}  # fmt: skip

    def _interval(self, now: float) -> int:
        """The interval of a moment; makes room for it."""
        i = max(0, int((now - self._start) / self._interval_s))
        while i >= _MOST_INTERVALS:
            self._steps, self._tokens = _pairs(self._steps, sum), _pairs(self._tokens, sum)
            self._sequences, self._batch_tokens = _pairs(self._sequences, sum), _pairs(self._batch_tokens, sum)
            self._longest_s, self._blocks = _pairs(self._longest_s, max), _pairs(self._blocks, max)
            self._interval_s *= 2
            i //= 2
        missing = i + 1 - len(self._steps)
        if missing > 0:
            for column in (self._steps, self._tokens, self._sequences, self._batch_tokens, self._blocks):
                column += [0] * missing
            self._longest_s += [0.0] * missing
        return i


def _pairs(values: list[Any], join: Any) -> list[Any]:
    return [join(values[i : i + 2]) for i in range(0, len(values), 2)]
