"""`hpcinfer run`, whose process kills itself without warning at an event that its first argument names."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from hpcinfer.__main__ import main
from hpcinfer.recovery import claims, journal, merging


def _die(*arguments: object, **options: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_after(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Call a function so many times, then die."""
    calls = iter(range(1, count))

    def call(*arguments: object, **options: object) -> object:
        result = function(*arguments, **options)
        return result if next(calls, None) else _die()

    return call


EVENTS = {
    "claimed": lambda: setattr(claims, "publish_bytes", _die_after(claims.publish_bytes, 3)),
    "data-synced": lambda: setattr(journal, "seal", _die),  # the entries are not written yet
    "output-renamed": lambda: setattr(merging, "replace_bytes", _die),  # complete.json is not written yet
}

if __name__ == "__main__":
    EVENTS[sys.argv[1]]()
    raise SystemExit(main(["run", *sys.argv[2:]]))
