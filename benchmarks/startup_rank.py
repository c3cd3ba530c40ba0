"""`hpcinfer run` that leaves a mark in the trace of its system calls when its first token is there.

    mpirun -n 2 strace ... python benchmarks/startup_rank.py OPTIONS_OF_RUN

The mark is a question for a file that is not there. Every rank asks it at the end of the first step that gave a token.
"""

import os
import sys
import time
from typing import Any

from hpcinfer.__main__ import main
from hpcinfer.report.timeline import Timeline

MARK = "the first token is there"
_TIMES = "HPCINFER_STARTUP_TIMES"  # folder for the seconds of each rank since its process began

_step = Timeline.step


def _first_step(timeline: Timeline, *values: Any, **more: Any) -> None:
    os.access(MARK, os.F_OK)
    Timeline.step = _step  # type: ignore[method-assign]
    if folder := os.environ.get(_TIMES):
        with open(os.path.join(folder, str(os.getpid())), "w") as file:
            file.write(str(_age_s()))
    _step(timeline, *values, **more)


def _age_s() -> float:
    with open("/proc/self/stat") as file:
        start_ticks = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    Timeline.step = _first_step  # type: ignore[method-assign]
    sys.exit(main(["run", *sys.argv[1:]]))
