"""`hpcinfer doctor`, where rank 1 stops at a moment of our choice: python sick_doctor.py MOMENT [flags]."""

import os
import signal
import sys
import time


def _stop_at(moment: str) -> None:
    """Make rank 1 hang or die when it comes there."""
    from hpcinfer.diagnosis import examination

    name, how = {"facts": ("read_facts", _hang), "facts-death": ("read_facts", _die),
                 "measuring": ("_measure", _hang), "measuring-death": ("_measure", _die)}[moment]  # fmt: skip
    setattr(examination, name, how)


def _hang(*arguments: object) -> None:
    time.sleep(60)


def _die(*arguments: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    moment = sys.argv.pop(1)
    if os.environ.get("OMPI_COMM_WORLD_RANK") == "1":
        _hang() if moment == "start" else _stop_at(moment)
    from hpcinfer.__main__ import main

    raise SystemExit(main(["doctor", *sys.argv[1:]]))
