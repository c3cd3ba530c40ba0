"""How far a job is and who works on it, read from its directory alone while it runs."""

import os
import time
from pathlib import Path
from typing import NamedTuple

from hpcinfer.recovery.attempts import current_attempt
from hpcinfer.recovery.index import Index
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.leases import read_lease
from hpcinfer.recovery.merging import read_complete
from hpcinfer.recovery.sidecar import ENTRY, JournalReader, created_time
from hpcinfer.recovery.states import RowStates

SILENT_S = 600.0  # a worker without a sign of life for so long has most likely ended; only status says so
_RECENT_S = 60.0  # parts written to so long before the last sign of life of the job count for its rate


class Worker(NamedTuple):
    """A job that holds a lease."""

    lease: str
    host: str
    pid: int
    slurm_job_id: str
    sign_of_life_s: float  # age of its last sign of life, by this machine's clock; only informative


class Progress(NamedTuple):
    """Numbers of a job."""

    num_rows: int
    num_done: int
    num_failed: int  # of those that are done
    num_unfinished: int  # in this attempt
    attempt: int
    rows_per_s: float  # of the parts that were written to lately; 0 if nobody works
    time_left_s: float | None
    workers: list[Worker]
    is_merged: bool


def progress(paths: JobPaths) -> Progress | None:
    """Add up the journal. Not collective.

    Returns:
        None while the index is not built yet.
    """
    paths.require()
    if not paths.index.exists():
        return None
    index, attempt = Index.open(paths.index), current_attempt(paths)
    states = RowStates(index.num_rows, attempt)
    states.read_all(JournalReader(paths))
    workers, num_left = living_workers(paths), states.num_unfinished
    rate = _rate(paths) if any(worker.sign_of_life_s < SILENT_S for worker in workers) else 0.0
    return Progress(index.num_rows, states.num_done, states.num_failed, num_left, attempt, rate,
                    num_left / rate if rate else None, workers, read_complete(paths) is not None)


def living_workers(paths: JobPaths) -> list[Worker]:
    """List who holds a lease, without those whose process was on this host and is gone. Not collective."""
    workers = []
    for path in sorted(paths.leases.iterdir()):
        try:
            age_s = time.time() - path.stat().st_mtime
            _, holder = read_lease(path)
        except FileNotFoundError:
            continue  # ended while we were looking
        if holder and not holder.is_gone():
            workers.append(Worker(path.name, holder.host, holder.pid, holder.slurm_job_id, max(age_s, 0.0)))
    return workers


def _rate(paths: JobPaths) -> float:
    """Rows per second, summed over the parts that were written to lately, each over its own life."""
    stats = {path: path.stat() for path in _sidecars(paths)}
    signs = [path.stat().st_mtime for path in paths.leases.iterdir()]
    newest = max([stat.st_mtime for stat in stats.values()] + signs, default=0.0)
    return sum(_part_rate(path, stat) for path, stat in stats.items() if newest - stat.st_mtime <= _RECENT_S)


def _part_rate(sidecar: Path, stat: os.stat_result) -> float:
    created, num_lines = created_time(sidecar), stat.st_size // ENTRY.itemsize - 1
    return num_lines / max(stat.st_mtime - created, 1.0) if created and num_lines > 0 else 0.0


def _sidecars(paths: JobPaths) -> list[Path]:
    return sorted(paths.parts.glob(paths.part_sidecar("*").name))
