"""What a report says of the node that a rank runs on, and what the system counted of this process."""

import os
from pathlib import Path
from typing import Any

_NAMES = ("model name", "Model", "cpu model", "cpu")  # of the processor, as x86, Arm, MIPS and POWER have them


def describe_node(proc: Path = Path("/proc")) -> dict[str, Any]:
    """Describe processor and memory, as JSON values; None where the system does not say."""
    return {"cpu": _cpu_model(proc), "cpus": os.cpu_count(), "memory_bytes": _memory_bytes(proc)}


def read_io(proc: Path = Path("/proc")) -> dict[str, int] | None:
    """Read what this process has read and written so far, of all files; None where the system does not count.

    `rchar` and `wchar` were asked for, `read_bytes` and `write_bytes` left or reached a file system's disk.
    """
    try:
        lines = (proc / "self" / "io").read_text().splitlines()
        counts = {name: int(value) for name, _, value in (line.partition(":") for line in lines)}
        return {name: counts[name] for name in ("rchar", "wchar", "read_bytes", "write_bytes")}
    except (OSError, ValueError, KeyError):
        return None


def _cpu_model(proc: Path) -> str | None:
    try:
        lines = (proc / "cpuinfo").read_text().splitlines()
    except OSError:
        return None
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return next((values[name] for name in _NAMES if values.get(name)), None)


def _memory_bytes(proc: Path) -> int | None:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    except (OSError, ValueError, StopIteration):
        return None
