"""The merge: finished lines of all parts, in input order, in one file that appears whole."""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hpcinfer.agree import on_all, on_root
from hpcinfer.errors import JobDirectoryError
from hpcinfer.partition.split import split
from hpcinfer.recovery.attempts import current_attempt
from hpcinfer.recovery.copying import copy_lines
from hpcinfer.recovery.digests import digest_of
from hpcinfer.recovery.durable import create, naming, remove_abandoned, rename, replace_bytes, temporary_path
from hpcinfer.recovery.index import Index
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.patience import patiently
from hpcinfer.recovery.sidecar import JournalReader
from hpcinfer.recovery.states import RowStates
from hpcinfer.recovery.winners import Winners

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

log = logging.getLogger(__name__)

CACHES_S = 90.0  # longer than shared file systems remember sizes and names (NFS: at most 60 s)
_POLL_S = 0.5
MAX_MERGERS = 64  # ranks that take part; each of them reads all sidecars


class MergeReport(NamedTuple):
    """What a merge found and wrote."""

    num_rows: int  # of the input
    num_done: int  # lines of the output
    num_failed: int  # lines that are error records
    size_bytes: int
    num_overlaps: int  # rows computed twice, with the same bytes
    num_conflicts: int  # rows computed twice, with other bytes: the job must end with code 1
    num_unfinished: int  # rows that need work in this attempt, those without a line included
    attempt: int
    digest: str = ""  # of the output: SHA-256 over the SHA-256 of each 16 MiB; "" if none was written


def merge(paths: JobPaths, output: Path, group: Collectives, *, partial: bool = False,
          patience_s: float = 0.0) -> MergeReport:
    """Write all lines in input order; with `partial`, those that are finished.

    Collective over the group. Can be repeated; a killed merge leaves nothing that looks like an output.

    Args:
        patience_s: how long rows that are missing are waited for. Who knows that the job is complete gives
            `CACHES_S`: a node may see other nodes' files as they were before.

    Raises:
        JobDirectoryError: rows are not finished in the current attempt (without `partial`), or lines in parts are
            damaged.
    """
    attempt = int(on_root(group, lambda: str(current_attempt(paths)).encode()))
    num_rows = on_all(group, lambda: Index.open(paths.index).num_rows)
    winners = Winners(_share(num_rows, group), attempt)
    report, offset = _collect(JournalReader(paths), winners, num_rows, group, 0.0 if partial else patience_s)
    if not partial:
        on_all(group, lambda: _require_all(report, paths))
    target = Path(os.path.realpath(output))  # of a link the file that it names, which may lie elsewhere
    temporary = Path(os.fsdecode(on_root(group, lambda: _create(target, report.size_bytes))))
    try:
        digests = on_all(group, lambda: copy_lines(paths, winners, temporary, offset))
        own = digests.finish(report.size_bytes)
        report = report._replace(digest=digest_of(temporary, report.size_bytes, own, group))
        on_root(group, lambda: _finish(temporary, target))
        if output == paths.output and report.num_unfinished == 0:
            on_root(group, lambda: _complete(paths, report))
    finally:
        if group.rank == 0:
            with suppress(OSError):  # what is left is removed by later merges
                temporary.unlink()
    if group.rank == 0 and report.num_conflicts:
        log.warning("%d rows were computed twice with different results: a bug or a broken machine",
                    report.num_conflicts)
    return report


def count(paths: JobPaths) -> MergeReport:
    """Count what a merge would find, without a look at the lines. Not collective."""
    attempt, num_rows = current_attempt(paths), Index.open(paths.index).num_rows
    states = RowStates(num_rows, attempt)
    states.read_all(JournalReader(paths))
    return MergeReport(num_rows, states.num_done, states.num_failed, 0, 0, 0, states.num_unfinished, attempt)


def read_complete(paths: JobPaths) -> MergeReport | None:
    """Return the report of the merge that wrote the output, if the output is still as it was written.

    Not collective.
    """
    try:
        report = MergeReport(**json.loads(paths.complete.read_bytes()))
        is_there = paths.output.stat().st_size == report.size_bytes
    except (OSError, ValueError, TypeError):
        return None
    is_whole = report.num_unfinished == 0 and report.attempt == current_attempt(paths)
    return report if is_there and is_whole else None


def _share(num_rows: int, group: Collectives) -> range:
    num_mergers = min(group.size, MAX_MERGERS)
    return split(num_rows, num_mergers)[group.rank] if group.rank < num_mergers else range(0)


def _collect(reader: JournalReader, winners: Winners, num_rows: int, group: Collectives,
             patience_s: float) -> tuple[MergeReport, int]:
    """Read the journal, more than once while rows are missing and there is patience."""
    end = time.monotonic() + patience_s
    while True:
        on_all(group, lambda: winners.read(reader))
        report, offset = _add_up(winners, num_rows, group)
        if report.num_unfinished == 0 or not on_root(group, lambda: b"1" if time.monotonic() < end else b""):
            return report, offset
        log.debug("%d rows cannot be seen yet", report.num_unfinished)
        time.sleep(_POLL_S)


def _add_up(winners: Winners, num_rows: int, group: Collectives) -> tuple[MergeReport, int]:
    """Sum what the ranks found, and place this rank's bytes after those of the ranks before it."""
    own = (winners.num_done, winners.num_failed, winners.size_bytes, winners.num_overlaps, winners.num_conflicts,
           winners.num_unfinished)
    found = [json.loads(item) for item in group.all_gather_bytes(json.dumps(own).encode())]
    totals = [sum(column) for column in zip(*found, strict=True)]
    offset = sum(item[2] for item in found[:group.rank])
    return MergeReport._make((num_rows, *totals, winners.attempt, "")), offset


def _require_all(report: MergeReport, paths: JobPaths) -> None:
    if report.num_unfinished:
        retry = f" in retry {report.attempt}" if report.attempt else ""
        raise JobDirectoryError(f"{report.num_unfinished} of {report.num_rows} rows are not finished{retry}",
                                where=str(paths.root),
                                hint="run the job again to finish them, or merge with --partial")


def _create(output: Path, size_bytes: int) -> bytes:
    return os.fsencode(patiently(lambda: _new_file(output, size_bytes), output))


def _new_file(output: Path, size_bytes: int) -> Path:
    remove_abandoned(output)
    temporary = temporary_path(output)
    descriptor = create(temporary)
    try:
        with naming(temporary):
            os.ftruncate(descriptor, size_bytes)
    except OSError:
        temporary.unlink()
        raise
    finally:
        os.close(descriptor)
    return temporary


def _finish(temporary: Path, target: Path) -> bytes:
    """Give the output its name."""
    rename(temporary, target)
    return b""


def _complete(paths: JobPaths, report: MergeReport) -> bytes:
    """Mark the job as complete."""
    replace_bytes(paths.complete, (json.dumps(report._asdict(), indent=2) + "\n").encode())
    return b""
