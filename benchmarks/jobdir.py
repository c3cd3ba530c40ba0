"""Time and peak memory per rank of a job directory with many rows and an engine that only echoes.

    python benchmarks/jobdir.py --rows 10000000
    mpiexec -n 2 python benchmarks/jobdir.py --rows 10000000

Needs about 400 bytes of disk per row, in --dir, and removes them at the end.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from hpcinfer.agree import on_root
from hpcinfer.comm.world import start_world
from hpcinfer.partition.split import split
from hpcinfer.recovery.claims import Claimer
from hpcinfer.recovery.index import Index, build_index
from hpcinfer.recovery.inputs import inspect_input
from hpcinfer.recovery.journal import PartWriter
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.leases import Lease, incarnation_name
from hpcinfer.recovery.manifest import open_manifest
from hpcinfer.recovery.merging import merge
from hpcinfer.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

T = TypeVar("T")


class Phase(NamedTuple):
    """One line of the table."""

    name: str
    seconds: float
    peak_bytes: int  # of the rank that needed most


class Stopwatch:
    """Measures phases on all ranks."""

    def __init__(self, group: "Collectives") -> None:
        self._group = group
        self.phases: list[Phase] = []

    def measure(self, name: str, work: Callable[[], T]) -> T:
        """Run a phase; its memory is the peak of the resident set, mapped files included."""
        self._group.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        start = time.perf_counter()
        result = work()
        peaks = self._group.all_gather_bytes(str(_peak_bytes()).encode())
        self.phases.append(Phase(name, time.perf_counter() - start, max(map(int, peaks))))
        return result


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dir", type=Path, default=None, help="where to write (a new temporary directory inside)")
    args = parser.parse_args()
    group = start_world()
    directory = Path(on_root(group, lambda: tempfile.mkdtemp(prefix="jobdir-", dir=args.dir).encode()).decode())
    try:
        phases = _measure(directory, args.rows, group)
    finally:
        group.barrier()
        if group.rank == 0:
            shutil.rmtree(directory)
    if group.rank == 0:
        print(f"{args.rows} rows, {group.size} ranks")
        for phase in phases:
            print(f"{phase.name:<24} {format_seconds(phase.seconds):>14} {format_bytes(phase.peak_bytes):>12} per rank")


def _measure(directory: Path, num_rows: int, group: "Collectives") -> list[Phase]:
    paths, source, watch = JobPaths(directory / "out.jsonl"), directory / "in.jsonl", Stopwatch(group)
    on_root(group, lambda: _write_input(source, num_rows))
    watch.measure("hash the input", lambda: inspect_input(source, group))
    open_manifest(paths, {"rows": num_rows}, group)
    index = watch.measure("index", lambda: build_index(paths, source, "jsonl", group))
    order = np.concatenate([index.block_rows(block) for block in range(index.num_blocks)])
    halves = np.array_split(order, 2)
    watch.measure("resume, nothing done", lambda: _resume(paths, index, 0, group))
    watch.measure("write half the journal", lambda: _finish(paths, halves[0], group))
    watch.measure("resume, half done", lambda: _resume(paths, index, len(halves[0]), group))
    watch.measure("write the other half", lambda: _finish(paths, halves[1], group))
    watch.measure("resume, all done", lambda: _resume(paths, index, num_rows, group))
    report = watch.measure("merge", lambda: merge(paths, paths.output, group))
    assert report.num_done == num_rows and report.num_overlaps == 0, report
    return watch.phases


def _write_input(source: Path, num_rows: int) -> bytes:
    with source.open("wb", buffering=1 << 20) as file:
        for row in range(num_rows):
            file.write(b'{"custom_id": "r%d", "prompt": "What is %d squared?", "max_tokens": %d}\n'
                       % (row, row * 2654435761 % 1000003, 16 + row % 113))
    return b""


def _finish(paths: JobPaths, rows: np.ndarray, group: "Collectives") -> None:
    """Write the lines that an engine would have written, each rank its share."""
    share = split(len(rows), group.size)[group.rank]
    with PartWriter(paths, incarnation_name()) as writer:
        for start in range(share.start, share.stop, 1 << 16):
            for row in rows[start:min(start + (1 << 16), share.stop)].tolist():
                writer.append(row, 1, b'{"custom_id": "r%d", "text": "a stub of a completion, about %d"}' % (row, row))


def _resume(paths: JobPaths, index: Index, num_done: int, group: "Collectives") -> None:
    """Start the claimant, as every start of the job does, and claim one block."""
    if group.rank == 0:
        with Lease(paths.leases, 180.0) as lease:
            claimer = Claimer(paths, index, lease)
            assert claimer.num_done == num_done, claimer.num_done
            assert (claimer.claim() is None) == (num_done == index.num_rows)
    group.barrier()


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    main()
