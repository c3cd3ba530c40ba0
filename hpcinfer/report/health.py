"""How the replicas of a job are, from the pulses that their leaders send: tokens per second, who is slow or silent."""

from __future__ import annotations

import struct
from collections import defaultdict, deque
from collections.abc import Collection, Iterable
from statistics import median
from typing import NamedTuple

from hpcinfer.units import format_seconds

_PULSE = struct.Struct("<qqqqd")
_SILENT_PULSES = 10  # that did not come: until then steps may just be long
_SLOW = 2.0  # times as long for a step as the others
_MORE = 1.5  # times the sequences of the others explain longer steps
_WINDOW_PULSES = 10  # over which a pace is taken
_NAMED = 3  # replicas that a line names


class Pulse(NamedTuple):
    """What a leader has done so far."""

    replica: int
    steps: int
    tokens: int  # output tokens
    sequences: int  # of all its steps
    time: float  # by the leader's own clock, in seconds

    def to_bytes(self) -> bytes:
        """Encode."""
        return _PULSE.pack(*self)

    @staticmethod
    def from_bytes(data: bytes) -> Pulse:
        """Decode what `to_bytes` made."""
        return Pulse(*_PULSE.unpack(data))


class _Pace(NamedTuple):
    """What a replica did in its last pulses."""

    heard: float  # when the last one came, by our clock
    tokens_per_s: float
    step_s: float  # 0 without steps
    batch: float  # sequences of a step


class Health:
    """What is known of all replicas.

    Args:
        replicas: all of the job.
        interval_s: between two pulses of a leader.
        now: by the monotonic clock of this rank.
    """

    def __init__(self, replicas: Iterable[int], interval_s: float, now: float) -> None:
        self._interval_s = interval_s
        self._pulses: defaultdict[int, deque[Pulse]] = defaultdict(lambda: deque(maxlen=_WINDOW_PULSES + 1))
        self._paces = {replica: _Pace(now, 0.0, 0.0, 0.0) for replica in replicas}

    def hear(self, pulse: Pulse, now: float) -> None:
        """Take in a pulse."""
        pulses = self._pulses[pulse.replica]
        if pulses and (pulse.time <= pulses[-1].time or pulse.steps < pulses[-1].steps):
            pulses.clear()  # another leader counts from zero
        pulses.append(pulse)
        first = pulses[0]
        steps, elapsed_s = pulse.steps - first.steps, pulse.time - first.time
        self._paces[pulse.replica] = _Pace(
            now, (pulse.tokens - first.tokens) / elapsed_s if elapsed_s else 0.0, elapsed_s / steps if steps else 0.0,
            (pulse.sequences - first.sequences) / steps if steps else 0.0,
        )  # fmt: skip

    def tokens_per_s(self, now: float) -> float:
        """Output tokens per second of all replicas that are not silent."""
        return sum(pace.tokens_per_s for pace in self._paces.values() if not self._is_silent(pace, now))

    def describe(self, now: float, recovering: Collection[int] = (), lost: Collection[int] = ()) -> str:
        """Say how many replicas are well, and what is wrong with the others.

        Args:
            now: by the monotonic clock of this rank.
            recovering: those whose leader has died.
            lost: those that are no more.
        """
        wrong = dict.fromkeys(lost, "lost") | dict.fromkeys(recovering, "recovering")
        for replica, pace in self._paces.items():
            if replica not in wrong and self._is_silent(pace, now):
                wrong[replica] = f"silent for {format_seconds(now - pace.heard)}"
        num_well, total = len(self._paces) - len(wrong), len(self._paces)
        slow = {replica: words for replica, words in self._slow(now) if replica not in wrong}
        named = sorted((wrong | slow).items())
        words = [f"{num_well}/{total} replicas", *(f"replica {replica} {what}" for replica, what in named[:_NAMED])]
        return ", ".join(words) + (f" and {len(named) - _NAMED} more" if len(named) > _NAMED else "")

    def _slow(self, now: float) -> Iterable[tuple[int, str]]:
        working = {replica: pace for replica, pace in self._paces.items()
                   if pace.step_s > 0 and not self._is_silent(pace, now)}  # fmt: skip
        for replica, pace in working.items():
            others = [each for other, each in working.items() if other != replica]
            if not others:
                continue
            usual_s, usual_batch = median(each.step_s for each in others), median(each.batch for each in others)
            if pace.step_s > _SLOW * usual_s and pace.batch <= _MORE * usual_batch:
                yield replica, f"slow ({pace.step_s / usual_s:.1f} times the others' time for a step)"

    def _is_silent(self, pace: _Pace, now: float) -> bool:
        return now - pace.heard > _SILENT_PULSES * self._interval_s
