"""`hpcinfer run`, where one rank hangs: its number and what hangs are the first arguments."""

import ctypes
import os
import sys
from collections.abc import Callable

from hpcinfer.__main__ import main
from hpcinfer.engine.sampler import Sampler
from hpcinfer.recovery.journal import PartWriter
from hpcinfer.weights import parallel_reads


def _hang(*arguments: object, **options: object) -> None:
    """Wait for what never comes, as a read from a server that is away."""
    os.read(os.pipe()[0], 1)


def _hold_everything(*arguments: object, **options: object) -> None:
    """The same in a library that lets no other thread of the process go on."""
    ctypes.PyDLL(None).pause()


EVENTS: dict[str, Callable[[], None]] = {
    "load": lambda: setattr(parallel_reads, "_read_pieces", _hang),
    "journal": lambda: setattr(PartWriter, "maybe_flush", _hang),
    "library": lambda: setattr(Sampler, "start", _hold_everything),
}

if __name__ == "__main__":
    if os.environ.get("OMPI_COMM_WORLD_RANK") == sys.argv[1]:
        EVENTS[sys.argv[2]]()
    raise SystemExit(main(["run", *sys.argv[3:]]))
