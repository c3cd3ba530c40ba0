"""When the time of this job is over, and whether more work would be finished before.

The one place where a time of another clock is read: Slurm's seconds since 1970 become seconds left on this node's own
clock, once, and count down on its monotonic clock from then on. Other ranks are told the seconds that are left.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import psutil

from hpcinfer.agree import on_root
from hpcinfer.config import JobOptions
from hpcinfer.recovery import slurm_job

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

log = logging.getLogger(__name__)

_MARGIN_SHARE = 0.1  # of the whole time, at most
_WINDOW_S = 120.0  # over which the speed is measured
_RESOLUTION = 120  # looks within the window that count
_LEAST_S = 1.0  # a shorter time measures nothing


class Period(NamedTuple):
    """A time that was granted."""

    left_s: float
    whole_s: float
    source: str  # who granted it


@dataclass(frozen=True)
class TimeLimit:
    """When to stop, by this process's monotonic clock."""

    stop_at: float
    source: str

    @staticmethod
    def of(period: Period, margin_s: float) -> TimeLimit:
        """Count down from now. Not collective."""
        margin_s = min(margin_s, _MARGIN_SHARE * period.whole_s)
        return TimeLimit(time.monotonic() + period.left_s - margin_s, period.source)

    @property
    def left_s(self) -> float:
        """Seconds until work must be put away; negative when it is late."""
        return self.stop_at - time.monotonic()


def agree_time_limit(options: JobOptions, group: Collectives) -> TimeLimit | None:
    """Find out on the root when the time is over, and tell every rank; None if it never is.

    Collective over the group. Slurm is asked once, if its environment does not say the end.
    """
    found = on_root(group, lambda: json.dumps(find_period(options.time_limit)).encode())
    period = json.loads(found)
    return TimeLimit.of(Period(*period), options.stop_margin) if period else None


def find_period(limit_s: float | None, environment: Mapping[str, str] = os.environ) -> Period | None:
    """Find which time is over first: the allocation's, or the one that the user gave to this process.

    Not collective.
    """
    periods = [period for period in (_allocation(environment), _given(limit_s)) if period]
    return min(periods, default=None)


def _given(limit_s: float | None) -> Period | None:
    if limit_s is None:
        return None
    age_s = max(time.time() - psutil.Process().create_time(), 0.0)
    return Period(limit_s - age_s, limit_s, "--time-limit")


def _allocation(environment: Mapping[str, str]) -> Period | None:
    start, end = (_seconds(environment.get(f"SLURM_JOB_{name}_TIME")) for name in ("START", "END"))
    source = "SLURM_JOB_END_TIME"
    if end is None:
        job = slurm_job.ask(environment)
        start, end, source = (job.start, job.end, "scontrol") if job and job.limit_s else (None, None, "")
    if end is None:
        return None
    left_s = end - time.time()
    whole_s = left_s if start is None else end - start
    return Period(min(left_s, whole_s), whole_s, source)  # more than the whole: this clock is behind Slurm's


def _seconds(text: str | None) -> float | None:
    return float(text) if text and text.isdigit() else None


class Pace:
    """Rows that this job finishes per second, as measured over the last while."""

    def __init__(self, window_s: float = _WINDOW_S) -> None:
        self._window_s = window_s
        self._samples: deque[tuple[float, int]] = deque()  # time, rows finished until then

    def observe(self, num_finished: int, now: float | None = None) -> None:
        """Take in how many rows are finished so far; `now` is `time.monotonic()`. Not collective."""
        now = time.monotonic() if now is None else now
        if self._samples and now - self._samples[-1][0] < self._window_s / _RESOLUTION:
            return
        self._samples.append((now, num_finished))
        while len(self._samples) > 2 and self._samples[1][0] <= now - self._window_s:
            self._samples.popleft()

    def seconds_for(self, num_rows: int) -> float | None:
        """Expect how long so many rows take; None as long as nobody knows. Not collective."""
        if not self._samples:
            return None
        (start, first), (end, last) = self._samples[0], self._samples[-1]
        if last <= first or end - start < _LEAST_S:
            return None
        return num_rows * (end - start) / (last - first)
