"""`hpcinfer run`, where rank 1 fails in the middle of its work."""

import os

from hpcinfer.__main__ import main
from hpcinfer.engine.sampler import Sampler


def _break(sampler: Sampler, *arguments: object) -> None:
    raise RuntimeError("this rank is broken")


if __name__ == "__main__":
    import sys

    if os.environ.get("OMPI_COMM_WORLD_RANK") == "1":
        Sampler.start = _break  # type: ignore[method-assign, assignment]
    raise SystemExit(main(["run", *sys.argv[1:]]))
