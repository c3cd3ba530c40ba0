"""`hpcinfer run`, whose file system is slow at first: a read takes as many seconds as the first argument says.

Given $DYING_RANK, that rank dies as soon as its weights begin to come, when no replica is built yet.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from hpcinfer.__main__ import main
from hpcinfer.recovery.loading import JobLoading
from hpcinfer.weights.reader import Store, UnitRead

if __name__ == "__main__":
    seconds, read_into, load = float(sys.argv[1]), Store.read_into, JobLoading.load

    def read_slowly(store: Store, wanted: Sequence[UnitRead], *, is_shared: bool = False) -> None:
        """Read, but not at once."""
        if threading.current_thread().name.startswith("reading weights"):
            time.sleep(seconds)
        read_into(store, wanted, is_shared=is_shared)

    def load_and_die(loading: JobLoading, *arguments: Any) -> object:
        """Begin to load, and die in the middle of it if this is the rank."""
        stage = load(loading, *arguments)
        if os.environ.get("DYING_RANK") == os.environ.get("OMPI_COMM_WORLD_RANK", "none"):
            time.sleep(seconds)
            os.kill(os.getpid(), signal.SIGKILL)
        return stage

    Store.read_into = read_slowly  # type: ignore[method-assign]
    JobLoading.load = load_and_die  # type: ignore[method-assign,assignment]
    raise SystemExit(main(["run", *sys.argv[2:]]))
