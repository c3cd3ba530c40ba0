"""A trace in the event format of Chrome and Perfetto: a row per rank, a process per replica, counters, faults."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

from hpcinfer.report.events import Happening
from hpcinfer.report.recording import BATCH

_COUNTERS = ("sequences", "tokens", "KV blocks")
_SPARES = 1_000_000  # process of the ranks that have no replica
_CLOCKS = "zero is the first event; ranks are aligned where all of them leave the loading, to about a message's time"

Recorded = dict[str, Any]  # of `Recording.to_json`


def write_trace(file: TextIO, ranks: Sequence[dict[str, Any]], recorded: Iterable[Recorded],
                happenings: Sequence[Happening]) -> None:
    """Write the trace of a run, rank by rank: it may be larger than memory should be.

    Args:
        file: is written to.
        ranks: reports: rank, host, place and first event.
        recorded: what each of them has kept, in the same order; read once.
        happenings: faults and recoveries.
    """
    file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
    zero, num_dropped = min((report.get("first_event_s", 0.0) for report in ranks), default=0.0), 0
    for report, kept in zip(ranks, recorded, strict=True):
        num_dropped += kept["num_dropped"]
        for event in _rank_events(report, kept, zero):
            file.write(json.dumps(event) + ",\n")
    for happening in happenings:
        file.write(json.dumps(_instant(happening, zero)) + ",\n")
    other = {"clocks": _CLOCKS, "run_begins_s": -zero, "events_dropped": num_dropped,
             "kept": "the first and the last events of each rank, where there were too many"}  # fmt: skip
    file.write(json.dumps(_meta("process_sort_index", _SPARES, 0, sort_index=_SPARES)) + "\n],\n")
    file.write(f'"otherData": {json.dumps(other)}}}\n')


def _rank_events(report: dict[str, Any], kept: Recorded, zero: float) -> Iterator[dict[str, Any]]:
    rank, place = report["rank"], report.get("place") or {}
    replica = place.get("replica", _SPARES)
    where = f" (pp {place['pp_rank']}, tp {place['tp_rank']})" if place else ""
    process = f"replica {replica}" if place else "spare ranks"
    yield _meta("process_name", replica, rank, name=process)
    yield _meta("thread_name", replica, rank, name=f"rank {rank}{where} on {report['host']}")
    yield _meta("thread_sort_index", replica, rank, sort_index=rank)
    is_leader = "timeline" in report
    for name, start, seconds, step, *values in kept["events"]:
        if name != BATCH:
            yield {"name": name, "ph": "X", "ts": _us(start - zero), "dur": _us(seconds), "pid": replica, "tid": rank,
                   "args": {"step": step}}  # fmt: skip
        elif is_leader:
            yield from _counters(start - zero, replica, values)


def _counters(start: float, replica: int, values: list[int]) -> Iterator[dict[str, Any]]:
    for name, value in zip(_COUNTERS, values, strict=True):
        yield {"name": name, "ph": "C", "ts": _us(start), "pid": replica, "args": {name: value}}


def _instant(happening: Happening, zero: float) -> dict[str, Any]:
    return {"name": "recovery", "ph": "i", "ts": _us(happening.time_s - zero), "s": "g",
            "pid": max(happening.replica, 0), "tid": 0,
            "args": {"what": happening.text, "replica": happening.replica}}  # fmt: skip


def _meta(name: str, pid: int, tid: int, /, **args: Any) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": pid, "tid": tid, "args": args}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)
