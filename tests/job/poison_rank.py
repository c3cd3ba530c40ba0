"""`hpcinfer run`, where one row crashes every rank that computes it."""

import os
import signal
import sys

from hpcinfer.__main__ import main
from hpcinfer.engine.batch import Batch
from hpcinfer.engine.runner import Runner

POISON_ROW = 7

_forward = Runner.forward


def _crash(runner: Runner, batch: Batch) -> None:
    if any(work.sequence.request.row == POISON_ROW for work in batch.works):
        os.kill(os.getpid(), signal.SIGSEGV)
    _forward(runner, batch)


if __name__ == "__main__":
    Runner.forward = _crash  # type: ignore[method-assign]
    raise SystemExit(main(["run", *sys.argv[1:]]))
