"""`hpcinfer run`, whose file system is slow: a read takes as many seconds as the first argument says."""

import sys
import time
from collections.abc import Sequence

from hpcinfer.__main__ import main
from hpcinfer.weights.reader import Store, UnitRead

if __name__ == "__main__":
    seconds, read_into = float(sys.argv[1]), Store.read_into

    def read_slowly(store: Store, wanted: Sequence[UnitRead]) -> None:
        """Read, but not at once."""
        time.sleep(seconds)
        read_into(store, wanted)

    Store.read_into = read_slowly  # type: ignore[method-assign]
    raise SystemExit(main(["run", *sys.argv[2:]]))
