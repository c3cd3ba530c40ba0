"""`hpcinfer run` on a file system of limited bandwidth, which all ranks of a host share; loads as its option says.

    python -m loading_rank WAY BYTES_PER_S CLOCK ...      # CLOCK: an empty file, WAY: a key of LOADINGS

A request takes its turn: it is done when the file system, at that bandwidth, has done all that was asked of it before.
"""

import fcntl
import sys
import time
from pathlib import Path
from typing import Any

from hpcinfer.__main__ import main
from hpcinfer.model.weights_of import StageWeights, load_stage
from hpcinfer.recovery import setup
from hpcinfer.recovery.loading import JobLoading
from hpcinfer.weights import parallel_reads
from hpcinfer.weights.requests import Request


class Counted(JobLoading):
    """Also counts what the system has read for this process."""

    def begin(self, *arguments: Any, **options: Any) -> None:
        """Begin, and remember what was read before."""
        self._read_before = read_bytes()
        super().begin(*arguments, **options)

    def report(self) -> dict[str, Any]:
        """Add the count."""
        return {**super().report(), "read_bytes": read_bytes() - self._read_before}


class Complete(Counted):
    """Weights are used when all of them are there."""

    def load(self, *arguments: Any) -> StageWeights:
        """Wait for all."""
        stage = super().load(*arguments)
        stage.wait()
        return stage


class Alone(Counted):
    """Each rank reads all that it needs, and begins when it has it: what a loader does that knows no other ranks."""

    def begin(self, *arguments: Any, **options: Any) -> None:
        """Begin alone."""
        self._start_time, self._read_before = time.time(), read_bytes()

    def load(self, kernels: Any, metrics: Any, plan: Any, options: Any) -> Any:
        """Read."""
        stage = load_stage(self._store, kernels, plan, options)
        self._seconds = dict.fromkeys(("last_byte_s", "last_layer_s"), time.time() - self._start_time)
        self._own_bytes = self._store.bytes_read
        return stage

    def report(self) -> dict[str, Any]:
        """What the others count too."""
        first_token_s = None if self._first_token_time is None else self._first_token_time - self._start_time
        return {"bytes_read": self._own_bytes, "bytes_received": 0, "bytes_sent": 0, **self._seconds,
                "first_token_s": first_token_s, "read_bytes": read_bytes() - self._read_before}  # fmt: skip


LOADINGS = {"together": Counted, "together, then begin": Complete, "each alone": Alone}


def read_bytes() -> int:
    """Bytes that the system has fetched from storage for this process."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["read_bytes"])


def limit(bytes_per_s: float, clock: Path) -> None:
    """Let requests to the store take as long as they would at that bandwidth."""
    read = parallel_reads._read_pieces

    def read_slowly(descriptor: int, request: Request) -> int:
        with clock.open("r+b", 0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            now = time.clock_gettime(time.CLOCK_MONOTONIC)
            done = max(float(file.read() or 0), now) + request.num_bytes / bytes_per_s
            file.seek(0)
            file.write(f"{done:.6f}".encode())
        count = read(descriptor, request)
        time.sleep(max(0.0, done - time.clock_gettime(time.CLOCK_MONOTONIC)))
        return count

    parallel_reads._read_pieces = read_slowly


if __name__ == "__main__":
    way, rate, place = sys.argv[1:4]
    setup.JobLoading = LOADINGS[way]  # type: ignore[misc]
    limit(float(rate), Path(place))
    raise SystemExit(main(["run", *sys.argv[4:]]))
