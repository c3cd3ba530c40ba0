"""Programs under measurement: run to the end, with the memory that they and their children need at most."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import psutil

_INTERVAL = 0.2  # s between two looks at the memory


def run_program(argv: list[str], environment: Mapping[str, str], folder: Path) -> int:
    """Run a program in a folder; return its peak memory in bytes, what processes share counted once.

    Raises:
        SystemExit: it failed; with all that it wrote.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=folder,
            env={**os.environ, **environment},
        )  # fmt: skip
        peak = 0
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_INTERVAL)
        if process.returncode != 0:
            output.seek(0)
            text = output.read().decode(errors="replace")
            raise SystemExit(f"{' '.join(argv)}\nended with {process.returncode}:\n{text}")
    return peak


def _memory(pid: int) -> int:
    """Memory of a process and all below it: proportional shares, where the system knows them."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                info = process.memory_full_info()
                total += getattr(info, "pss", info.rss)
    return total
