"""How a rank waits for messages: without holding a core that another one may need."""

import os
import threading
import time
from collections.abc import Callable, Sequence

from hpcinfer.comm.protocol import Pending
from hpcinfer.errors import RankFailedError

_SPIN_S = 0.0003  # wait without sleeping this long, then in naps
_NAP_SHARE, _NAP_S = 1 / 16, 0.0002  # a nap is this part of what has been waited so far, at most so long
_LOOKS = 20  # at the first message, before the others are looked at, too: a rank that one of them is of may have died


_meanwhile: dict[Callable[[], bool], int] = {}  # what goes on while a thread waits, and which thread


def work_meanwhile(turn: Callable[[], bool]) -> None:
    """Have this called again and again while this thread waits for messages, until it says that nothing is left to do.

    So messages of other work move where one thread has to see to all of them. Not collective.

    Args:
        turn: must neither wait nor raise.
    """
    _meanwhile[turn] = threading.get_ident()


def is_working_meanwhile() -> bool:
    """Whether something is to be called again and again. Not collective."""
    return bool(_meanwhile)


def turn_meanwhile() -> None:
    """Call what goes on meanwhile, where no message is waited for. Not collective."""
    for turn, thread in list(_meanwhile.items()):
        if thread == threading.get_ident() and not turn():
            del _meanwhile[turn]


class Pause:
    """What to do between two looks for a message: what goes on meanwhile; then give the core away, or nap."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self) -> None:
        """Pass a moment."""
        if _meanwhile:
            turn_meanwhile()
        waited = time.monotonic() - self._start
        if waited < _SPIN_S:
            os.sched_yield()
        else:
            time.sleep(min(_NAP_S, _NAP_SHARE * waited))


def wait_for(pending: Sequence[Pending], pause: Callable[[], None], check: Callable[[], None]) -> None:
    """Wait for messages; when one of them, or `check`, finds a dead rank, those that are still to come are cancelled.

    Not collective.

    Raises:
        RankFailedError: a rank has died.
    """
    waiting = list(pending)
    try:
        while waiting:
            for _ in range(_LOOKS):  # one look moves all messages on; looking at each would cost more than it finds
                if waiting[0].test():
                    del waiting[0]
                    break
                check()
                pause()
            else:
                waiting = [each for each in waiting if not each.test()]
    except RankFailedError:
        for each in waiting:
            each.cancel()
        raise
