"""How long the start of this process took, up to its first token, and what it read meanwhile.

Counts of opened files need a tracer: see benchmarks/startup.py.
"""

from __future__ import annotations

import os
import time
from typing import Any

FIRST_TOKEN = "first token"
_IO = {"syscr": "read_calls", "rchar": "bytes_read", "read_bytes": "bytes_from_storage"}  # Linux's names, and ours
_START_TICKS = 19  # field of /proc/self/stat behind the name of the program: clock ticks from boot to the start


class Startup:
    """Seconds from the start of the process to the events of its start; each counts once, the first time."""

    def __init__(self, process: str = "/proc/self") -> None:
        self._process = process
        self._origin = _start_time(process)
        self._seconds: dict[str, float] = {}
        self._io: dict[str, int] = {}

    def mark(self, event: str) -> None:
        """Note that something has happened; the first token ends the start."""
        if event in self._seconds or FIRST_TOKEN in self._seconds:
            return
        self._seconds[event] = round(self.age_s, 3)
        if event == FIRST_TOKEN:
            self._io = _read_io(self._process)

    @property
    def age_s(self) -> float:
        """Seconds since the process began."""
        return max(0.0, _now() - self._origin)

    def to_json(self) -> dict[str, Any]:
        """All marks, and what was read up to the first token, as JSON values."""
        return {"seconds": dict(self._seconds), **self._io}


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _start_time(process: str) -> float:
    """When the process began, on the clock of `_now`; now, where the system does not tell."""
    try:
        with open(f"{process}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return int(fields[_START_TICKS]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return _now()


def _read_io(process: str) -> dict[str, int]:
    """What the process has read so far, as the kernel counts it: pipes and /proc too, mapped files not."""
    try:
        with open(f"{process}/io") as file:
            counts = dict(line.split(": ") for line in file)
        return {ours: int(counts[name]) for name, ours in _IO.items()}
    except (OSError, ValueError, KeyError):
        return {}


STARTUP = Startup()  # of this process
