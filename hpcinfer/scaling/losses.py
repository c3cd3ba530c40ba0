"""Where the rank-seconds of a run go, out of its report: shares that add up to one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hpcinfer.report.classes import COMMUNICATION as TRAFFIC
from hpcinfer.report.classes import COMPUTE, INPUT_OUTPUT, SCHEDULING, WAITING, time_classes
from hpcinfer.report.metrics import IDLE, SPARE

COMPUTING, SLOWER = "computing", "slower computing"
COMMUNICATION, BUBBLES, IMBALANCE = "communication", "pipeline bubbles", "imbalance"
STORAGE, OTHER, START = "input and output", "scheduling, other", "start-up"
LOSSES = (SLOWER, COMMUNICATION, BUBBLES, IMBALANCE, STORAGE, OTHER, START)
SHARES = (COMPUTING, *LOSSES)


def rank_seconds(report: Mapping[str, Any], wall_s: float) -> dict[str, float]:
    """Divide the time of all ranks, from the launcher's start to its end.

    Args:
        report: of the run.
        wall_s: from the launcher's start to its end.

    Returns:
        Seconds by share, all ranks together; they add up to ranks x wall_s, `slower computing` not told apart yet.
    """
    phases, ranks = report["run"]["seconds"], report["ranks"]
    run_s, merge_s = min(phases["run"], wall_s), min(phases.get("merge", 0.0), max(wall_s - phases["run"], 0.0))
    total = dict.fromkeys(SHARES, 0.0)
    idle_s = _idle_at_the_end(ranks, run_s)
    for rank in ranks:
        own = _of_run(rank, run_s, idle_s.get(_place(rank).get("replica", -1), 0.0))
        for name, seconds in (*own.items(), (STORAGE, merge_s), (START, wall_s - run_s - merge_s)):
            total[name] += seconds
    return total


def _of_run(rank: Mapping[str, Any], run_s: float, idle_at_end_s: float) -> dict[str, float]:
    """Shares of one rank's part of the phase `run`; what it does not account for is other."""
    seconds, classes = rank["seconds"], time_classes({**rank, "phases": {"run": run_s}})
    pipeline_s, idle_s = seconds.get("pipeline", 0.0), seconds.get(IDLE, 0.0) + seconds.get(SPARE, 0.0)
    waiting_s = pipeline_s + classes[WAITING] - idle_s  # for others of its replica
    more_s = max(0.0, min(idle_at_end_s - idle_s, waiting_s))  # they waited for work meanwhile
    found = dict.fromkeys(SHARES, 0.0)
    found[COMPUTING], found[COMMUNICATION] = classes[COMPUTE], classes[TRAFFIC] - pipeline_s
    found[IMBALANCE], found[STORAGE], found[OTHER] = idle_s + more_s, classes[INPUT_OUTPUT], classes[SCHEDULING]
    found[_waiting_share(rank)] += waiting_s - more_s
    accounted = sum(found.values())
    if accounted > run_s:  # clocks of two phases that do not begin together
        return {name: value * run_s / accounted for name, value in found.items()}
    return found


def _waiting_share(rank: Mapping[str, Any]) -> str:
    if _place(rank).get("pp", 1) > 1:
        return BUBBLES
    return COMMUNICATION if _place(rank).get("tp", 1) > 1 else OTHER


def _idle_at_the_end(ranks: Iterable[Mapping[str, Any]], run_s: float) -> dict[int, float]:
    """Seconds since the last step of each replica, which its leader alone tells."""
    last: dict[int, float] = {}
    for rank in ranks:
        replica = _place(rank).get("replica")
        if replica is not None and rank.get("timeline"):
            last[replica] = max(last.get(replica, 0.0), rank["timeline"]["last_step_time"] - rank["began"])
    return {replica: max(0.0, run_s - last_s) for replica, last_s in last.items()}


def _place(rank: Mapping[str, Any]) -> Mapping[str, Any]:
    return rank.get("place") or {}  # spare ranks have none


def tell_slower(seconds: Mapping[str, float], tokens: int, least_s: float | None) -> dict[str, float]:
    """Divide computing into what the base point needs for so many tokens and what is on top, as shares of one.

    Args:
        seconds: of `rank_seconds`.
        tokens: that were computed.
        least_s: rank-seconds of computing for a token at the base point; None if there is none.
    """
    total = sum(seconds.values()) or 1.0
    useful = seconds[COMPUTING] if least_s is None else min(seconds[COMPUTING], tokens * least_s)
    parts = {**seconds, COMPUTING: useful, SLOWER: seconds[COMPUTING] - useful}
    return {name: parts[name] / total for name in SHARES}
