"""Progress of a job on stderr: a bar on a terminal, a plain line every few seconds elsewhere."""

import logging
import os
import sys
import time
from collections.abc import Callable

from hpcinfer.units import format_seconds

log = logging.getLogger(__name__)

_LINE_INTERVAL_S = 5.0
_BAR_INTERVAL_S = 0.2


def is_terminal() -> bool:
    """Whether stderr ends on a terminal, also where mpirun forwards it through a pipe."""
    if sys.stderr.isatty():
        return True
    try:
        target = os.readlink(f"/proc/{os.getppid()}/fd/2")
    except OSError:
        return False
    return target.startswith(("/dev/pts/", "/dev/tty")) and "OMPI_COMM_WORLD_RANK" in os.environ


class Progress:
    """Rows done, of all rows; `done` counts those that were finished before this start too."""

    def __init__(self, num_rows: int, done: int) -> None:
        self._num_rows, self._done, self._start_done = num_rows, done, done
        self._start = self._last = time.monotonic()
        self._bar = None
        if is_terminal():
            from tqdm import tqdm

            self._bar = tqdm(total=num_rows, initial=done, unit="row", file=sys.stderr, dynamic_ncols=True)
        self._interval = _BAR_INTERVAL_S if self._bar is not None else _LINE_INTERVAL_S

    def update(self, done: int, health: Callable[[], str] = str) -> None:
        """Show the state, if the last time is long enough ago.

        Args:
            done: rows.
            health: says how the replicas are; called only if it is shown.
        """
        now = time.monotonic()
        if now - self._last < self._interval:
            return
        self._last = now
        if self._bar is not None:
            self._bar.set_postfix_str(health(), refresh=False)
            self._bar.update(done - self._done)
            self._bar.refresh()
        else:
            log.info("%s", ", ".join(filter(None, [self._line(done, now), health()])))
        self._done = done

    def close(self, done: int) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.update(done - self._done)
            self._bar.close()

    def _line(self, done: int, now: float) -> str:
        rate = (done - self._start_done) / max(now - self._start, 1e-9)
        left = format_seconds((self._num_rows - done) / rate) if rate > 0 else "unknown"
        return f"{done}/{self._num_rows} rows, {rate:.1f} rows/s, time left {left}"
