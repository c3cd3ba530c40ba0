"""`hpcinfer run` with a stopwatch around every message inside a replica, and the kernels' own.

    mpirun -n 2 python benchmarks/timed_run.py OPTIONS_OF_RUN

The phases of a rank in the job's report exclude each other here: a second counts for the innermost one alone. Kernels
that do not measure themselves (the reference kernels) count for what calls them.
"""

import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hpcinfer.__main__ import main
from hpcinfer.kernels.protocol import Kernels
from hpcinfer.report.metrics import Metrics

_MESSAGES = ("all_gather", "gather", "send", "receive", "send_bytes", "receive_bytes")  # those of the step path
_SUMS = ("reduce", "start", "finish")  # of the reducer, which may go through memory that ranks share


class ExclusiveMetrics(Metrics):
    """Metrics whose phases do not count what phases and kernels inside them count."""

    def __init__(self) -> None:
        super().__init__()
        self._inside = [0.0]  # seconds of inner phases and kernels, for each open phase
        self._kernels: Kernels | None = None
        self._kernel_seconds: dict[str, float] = {}  # when last looked at

    def watch(self, kernels: Kernels) -> None:
        """Count the seconds of these kernels from now on."""
        self._kernels, self._kernel_seconds = kernels, kernels.phase_seconds()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a block to a phase, without that of phases and kernels in it."""
        self._note_kernels()
        outer, self.place = self.place, name
        self.moves += 1
        start = time.perf_counter()
        self._inside.append(0.0)
        try:
            yield
        finally:
            self.place = outer
            self._note_kernels()
            elapsed = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - self._inside.pop()
            self._inside[-1] += elapsed

    def _note_kernels(self) -> None:
        """Give what the kernels took since the last look to phases of their own, inside the innermost open one."""
        if self._kernels is None:
            return
        now = self._kernels.phase_seconds()
        for name, seconds in now.items():
            elapsed = seconds - self._kernel_seconds.get(name, 0.0)
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
            self._inside[-1] += elapsed
        self._kernel_seconds = now


class TimedGroup:
    """A group of ranks with a stopwatch around each message of the step path; everything else is passed on."""

    def __init__(self, group: Any, metrics: Metrics) -> None:
        self._group, self._metrics = group, metrics
        for name in _MESSAGES:
            setattr(self, name, metrics.phase("communication")(getattr(group, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def split(self, color: int, key: int) -> "TimedGroup":
        """Make a timed group of the ranks with the same colour."""
        return TimedGroup(self._group.split(color, key), self._metrics)


def install_stopwatches() -> None:
    """Have replicas built with timed groups and watched kernels."""
    assert "hpcinfer.engine.replica" not in sys.modules, "metrics must be replaced before others import them"
    module: Any = importlib.import_module("hpcinfer.report.metrics")
    module.Metrics = ExclusiveMetrics
    replica: Any = importlib.import_module("hpcinfer.engine.replica")
    build = replica.build_replica

    def build_timed(world: Any, mesh: Any, store: Any, kernels: Any, options: Any, load: Any = None) -> Any:
        built = build(TimedGroup(world, options.metrics), mesh, store, kernels, options, load)
        options.metrics.watch(kernels)
        if mesh.tp > 1:
            reducer = built.runner.stage.reducer
            for name in _SUMS:
                setattr(reducer, name, options.metrics.phase("communication")(getattr(reducer, name)))
        return built

    replica.build_replica = build_timed


if __name__ == "__main__":
    install_stopwatches()
    sys.exit(main(["run", *sys.argv[1:]]))
