"""One rank of collectives.py: sums of several sizes by several contenders, in turn; the first rank prints JSON.

Needs mpi4py and numpy, and hpcinfer for all contenders but `mpi`, so that it runs under any MPI.
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

_LEAST_CALLS, _MOST_CALLS = 2, 2000
_GRAINS = 8  # of a store

Work = Callable[[], Any]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", required=True, help="bytes of a sum")
    parser.add_argument("--contenders", nargs="+", required=True, help="mpi, auto (the selector), forms; or all")
    parser.add_argument("--seconds", type=float, required=True, help="for a size and contender")
    parser.add_argument("--rounds", type=int, required=True)
    arguments = parser.parse_args()
    world = MPI.COMM_WORLD
    reducers = Reducers() if arguments.contenders != ["mpi"] else None
    names = arguments.contenders
    if "all" in names and reducers is not None:
        names = ["mpi", "auto", *reducers.forms]
    found = []
    for size in arguments.sizes:
        send = np.random.default_rng(world.rank).standard_normal(size // 4, np.float32)
        works = {name: mpi_work(world, send) if name == "mpi" else reducers.work(name, send)  # type: ignore[union-attr]
                 for name in names}  # fmt: skip
        check_bits(world, {name: work for name, work in works.items() if name != "mpi"})
        seconds = measure(world, works, arguments.seconds, arguments.rounds)
        choice = reducers.choice(size) if reducers is not None else ""
        found.append({"num_bytes": size, "seconds": seconds, "choice": choice})
    if world.rank == 0:
        library = " ".join(MPI.Get_library_version().split(",")[0].split()[:4])
        print(json.dumps({"library": library, "ranks": world.size, "rows": found}), flush=True)


class Reducers:
    """hpcinfer's sums over the world, by form."""

    def __init__(self) -> None:
        from hpcinfer.comm.form_table import load_selector
        from hpcinfer.comm.forms import forms_for
        from hpcinfer.comm.selector import Selector
        from hpcinfer.comm.topology import discover
        from hpcinfer.comm.tree import TreeReducer
        from hpcinfer.comm.world import start_world

        world = start_world()
        world.locations = discover(world)
        self.forms = forms_for(world.locations)
        selectors = {name: Selector(name) for name in self.forms} | {"auto": load_selector(world)}
        self._reducers = {name: TreeReducer(world, _GRAINS, _empty, selector) for name, selector in selectors.items()}

    def work(self, name: str, send: np.ndarray) -> Work:
        """One call."""
        reducer = self._reducers[name]
        nodes = [send * (index + 1) for index in range(len(reducer.spans))]
        return lambda: reducer.reduce(nodes)

    def choice(self, num_bytes: int) -> str:
        """What the selector takes for a size."""
        return self._reducers["auto"].form_for(num_bytes)


def mpi_work(world: MPI.Comm, send: np.ndarray) -> Work:
    """One call of the MPI's own sum."""
    receive = np.empty_like(send)
    return lambda: world.Allreduce(send, receive)


def check_bits(world: MPI.Comm, works: dict[str, Work]) -> None:
    """Compare the sums of all forms on all ranks."""
    digests = {hashlib.sha256(work().tobytes()).hexdigest() for work in works.values()}
    if len(set().union(*world.allgather(digests))) > 1:
        raise SystemExit("forms differ in their bits")


def measure(world: MPI.Comm, works: dict[str, Work], seconds: float, rounds: int) -> dict[str, list[float]]:
    """Seconds of a call, of the slowest rank, round by round: loops without barriers, contenders in turn."""
    calls = {}
    for name, work in works.items():
        work()
        once = loop(world, work, 1)
        calls[name] = max(_LEAST_CALLS, min(_MOST_CALLS, int(seconds / rounds / once)))
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            found[name].append(loop(world, work, calls[name]))
    return found


def loop(world: MPI.Comm, work: Work, calls: int) -> float:
    """Seconds of a call in a loop, of the slowest rank."""
    world.Barrier()
    start = MPI.Wtime()
    for _ in range(calls):
        work()
    return float(world.allreduce((MPI.Wtime() - start) / calls, MPI.MAX))


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    return np.empty(shape, np.float32)


if __name__ == "__main__":
    main()
