"""The phases of a whole run on one rank: seconds and CPU seconds, and the moment that all ranks share."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any

from hpcinfer.report.metrics import Metrics
from hpcinfer.report.recording import Event, Recording


class RunPhases(Metrics):
    """Metrics of the phases that follow one another once: input, model, index, load, run, merge.

    Args:
        recording: keeps when they were, where a trace is wanted.
    """

    def __init__(self, recording: Recording | None = None) -> None:
        super().__init__()
        self.cpu_seconds: dict[str, float] = {}  # of all threads of this process, by phase
        self.recording = recording
        self.began_time = time.time()  # of the run: all ranks leave the loading together
        self.began = time.perf_counter()  # the same moment

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Add the time of a block to a phase, that of the clock and that of the CPUs."""
        return _RunPhase(self, name)

    def begin(self) -> None:
        """Say that the run begins now."""
        self.began_time, self.began = time.time(), time.perf_counter()

    def to_json(self) -> dict[str, Any]:
        """For the report of a rank, as JSON values."""
        return {"began": self.began_time, "phases": dict(self.seconds), "cpu_seconds": dict(self.cpu_seconds)}


class _RunPhase:
    __slots__ = ("_cpu", "_name", "_phase", "_phases", "_start")

    def __init__(self, phases: RunPhases, name: str) -> None:
        self._phases, self._name = phases, name
        self._phase = Metrics.phase(phases, name)

    def __enter__(self) -> None:
        self._start, self._cpu = time.perf_counter(), time.process_time()
        self._phase.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._phase.__exit__(*exception)
        phases, name, end = self._phases, self._name, time.perf_counter()
        cpu = time.process_time() - self._cpu
        phases.cpu_seconds[name] = phases.cpu_seconds.get(name, 0.0) + cpu
        if phases.recording is not None:
            phases.recording.add(Event(name, self._start, end - self._start, 0))
