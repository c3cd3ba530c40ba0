"""How a rank waits for messages: without holding a core that another one may need."""

import os
import time
from collections.abc import Callable, Sequence

from hpcinfer.comm.protocol import Pending
from hpcinfer.errors import RankFailedError

_SPIN_S = 0.002  # wait without sleeping this long, then in naps
_NAP_S = 0.0002


class Pause:
    """What to do between two looks for a message: give the core away, and nap when it is long in coming."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self) -> None:
        """Pass a moment."""
        if time.monotonic() - self._start < _SPIN_S:
            os.sched_yield()
        else:
            time.sleep(_NAP_S)


def wait_for(pending: Sequence[Pending], pause: Callable[[], None], check: Callable[[], None]) -> None:
    """Wait for messages; when one of them, or `check`, finds a dead rank, those that are still to come are cancelled.

    Not collective.

    Raises:
        RankFailedError: a rank has died.
    """
    waiting = list(pending)
    try:
        while waiting := [each for each in waiting if not each.test()]:
            check()
            pause()
    except RankFailedError:
        for each in waiting:
            each.cancel()
        raise
