"""Energy of the nodes of a run: RAPL of processors and memory, NVML of GPUs, where a user may read them.

They count whole nodes, also what others compute there. RAPL's counters begin again from zero after minutes, so a
thread reads them now and then; without any counter there is no thread.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

_POWERCAP = Path("/sys/class/powercap")
_NVML = "libnvidia-ml.so.1"
_READ_S = 20.0  # a counter of 65 kJ begins again after 1 min at 1 kW
_COUNTED = ("package", "dram")  # domains of RAPL that are no part of another one


class Counter(NamedTuple):
    """Something that counts energy."""

    name: str  # RAPL package-0, RAPL dram, GPU 0
    read: Callable[[], float | None]  # joules; None if that fails
    wraps_at: float  # joules after which it begins again; 0 is never


class EnergyMeter:
    """Adds up what counters say, from now on."""

    def __init__(self, counters: Iterable[Counter], why_not: str = "", read_s: float = _READ_S) -> None:
        """Begin.

        Args:
            counters: of this node.
            why_not: why some, or all, are not there.
            read_s: seconds between two looks.
        """
        self._counters, self._why_not, self._read_s = list(counters), why_not, read_s
        self._last = [_read(counter) for counter in self._counters]
        self._known = [last is not None for last in self._last]
        self._joules = [0.0] * len(self._counters)
        self._stop, self._lock = threading.Event(), threading.Lock()
        if self._counters:
            threading.Thread(target=self._run, name="energy", daemon=True).start()

    def stop(self) -> dict[str, Any]:
        """Look for the last time; give the joules as JSON values: `joules` is None where nothing can be read."""
        self._stop.set()
        self._look()
        found = list(zip(self._counters, self._joules, self._known, strict=True))
        parts = {counter.name: round(joules, 3) for counter, joules, is_known in found if is_known}
        failed = [f"{counter.name} could not be read to the end" for counter, _, is_known in found if not is_known]
        joules = sum(parts.values()) if parts and not failed else None
        return {"joules": joules, "parts": parts, "why_not": "; ".join(filter(None, [self._why_not, *failed]))}

    def _run(self) -> None:
        while not self._stop.wait(self._read_s):
            self._look()

    def _look(self) -> None:
        with self._lock:
            for i, counter in enumerate(self._counters):
                now, last = _read(counter), self._last[i]
                self._known[i] = now is not None and last is not None
                if now is None or last is None:
                    continue
                gone = now - last
                self._joules[i] += gone if gone >= 0 else gone + counter.wraps_at
                self._last[i] = now


def open_meter(powercap: Path = _POWERCAP, nvml: str = _NVML) -> EnergyMeter:
    """Begin to measure this node, with all counters that can be read."""
    processors, why_not = _rapl_counters(powercap)
    gpus = _nvml_counters(nvml)
    return EnergyMeter([*processors, *gpus], why_not)


def _read(counter: Counter) -> float | None:
    try:
        return counter.read()
    except (OSError, ValueError):
        return None


def _rapl_counters(folder: Path) -> tuple[list[Counter], str]:
    counters, unreadable = [], None
    for domain in sorted(folder.glob("*-rapl:*")):  # intel-rapl-mmio counts the same packages again
        try:
            name = (domain / "name").read_text().strip()
            if not name.startswith(_COUNTED):
                continue
            wraps_at = int((domain / "max_energy_range_uj").read_text()) / 1e6
            counter = Counter(f"RAPL {domain.name} {name}", _rapl_reader(domain / "energy_uj"), wraps_at)
            counter.read()
            counters.append(counter)
        except (OSError, ValueError) as error:
            unreadable = error
    if counters:
        return counters, ""
    reason = f"{unreadable.strerror}: {unreadable.filename}" if isinstance(unreadable, OSError) else f"no {folder}"
    return [], f"not readable here ({reason})"


def _rapl_reader(path: Path) -> Callable[[], float]:
    return lambda: int(path.read_text()) / 1e6


def _nvml_counters(name: str) -> list[Counter]:
    """Counters of all GPUs that this process sees; none where there is no driver, or it counts no energy."""
    try:
        library = ctypes.CDLL(name)
        if library.nvmlInit_v2() != 0:
            return []
        count = ctypes.c_uint()
        library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        return [Counter(f"GPU {i}", _nvml_reader(library, i), 0.0)
                for i in range(count.value) if _nvml_joules(library, i) is not None]  # fmt: skip
    except (OSError, AttributeError):
        return []


def _nvml_reader(library: ctypes.CDLL, index: int) -> Callable[[], float | None]:
    return lambda: _nvml_joules(library, index)


def _nvml_joules(library: ctypes.CDLL, index: int) -> float | None:
    device, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    if library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)) != 0:
        return None
    status = library.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules))
    return millijoules.value / 1e3 if status == 0 else None
