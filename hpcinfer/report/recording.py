"""What a rank keeps for a trace: its phases and batches, one by one, the first and the last. Only with --trace."""

from __future__ import annotations

import time
from collections import deque
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from hpcinfer.report.metrics import Metrics
from hpcinfer.report.timeline import Timeline

_MOST_EVENTS = 40_000  # of a rank
_MOST_OF_ALL = 2_000_000  # of all ranks together: what a viewer can still open
_FIRST_SHARE = 8  # one in so many is kept from the beginning, the others from the end


class Event(NamedTuple):
    """One stay in a phase, or one batch."""

    name: str
    start: float  # by `time.perf_counter`
    seconds: float
    step: int  # of the rank
    values: tuple[int, ...] = ()  # of a batch: sequences, tokens, KV blocks


class Recording:
    """The first and the last events of a rank, in bounded memory."""

    def __init__(self, num_ranks: int = 1) -> None:
        room = max(100, min(_MOST_EVENTS, _MOST_OF_ALL // num_ranks))
        self._first: list[Event] = []
        self._most_first = room // _FIRST_SHARE
        self._last: deque[Event] = deque(maxlen=room - self._most_first)
        self._num_added = 0

    def add(self, event: Event) -> None:
        """Keep an event; an older one may make room for it."""
        self._num_added += 1
        if len(self._first) < self._most_first:
            self._first.append(event)
        else:
            self._last.append(event)

    @property
    def num_dropped(self) -> int:
        """Events that made room."""
        return self._num_added - len(self._first) - len(self._last)

    def first_s(self, zero: float) -> float:
        """When the first of the events that are left began, in seconds from `zero` on; 0 if there is none."""
        return round(min((e.start - zero for e in (*self._first, *self._last)), default=0.0), 7)

    def to_json(self, zero: float) -> dict[str, Any]:
        """All events that are left, in seconds from `zero` on, as JSON values."""
        events = [[e.name, round(e.start - zero, 7), round(e.seconds, 7), e.step, *e.values]
                  for e in (*self._first, *self._last)]  # fmt: skip
        return {"events": events, "num_dropped": self.num_dropped}


class RecordingMetrics(Metrics):
    """Metrics that also keep each phase and each batch."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording
        self.timeline: Timeline = _RecordingTimeline(recording)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Add the time of a block to a phase, and keep when it was."""
        return _RecordedPhase(self, name)


BATCH = "batch"  # name of the events that are no phase


class _RecordingTimeline(Timeline):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def step(self, num_tokens: int, sequences: int = 0, batch_tokens: int = 0, blocks: int = 0,
             now: float | None = None) -> None:
        super().step(num_tokens, sequences, batch_tokens, blocks, now)
        values = (sequences, batch_tokens, blocks)
        self._recording.add(Event(BATCH, time.perf_counter(), 0.0, self.num_steps, values))


class _RecordedPhase:
    __slots__ = ("_metrics", "_name", "_phase", "_start")

    def __init__(self, metrics: RecordingMetrics, name: str) -> None:
        self._metrics, self._name = metrics, name
        self._phase = Metrics.phase(metrics, name)

    def __enter__(self) -> None:
        self._start = time.perf_counter()
        self._phase.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._phase.__exit__(*exception)
        metrics, start = self._metrics, self._start
        event = Event(self._name, start, time.perf_counter() - start, metrics.timeline.num_steps)
        metrics.recording.add(event)
