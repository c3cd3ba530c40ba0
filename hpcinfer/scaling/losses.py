"""Where the rank-seconds of a run go, out of its report: shares that add up to one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

COMPUTING, SLOWER = "computing", "slower computing"
COMMUNICATION, BUBBLES, IMBALANCE = "communication", "pipeline bubbles", "imbalance"
STORAGE, OTHER, START = "input and output", "scheduling, other", "start-up"
LOSSES = (SLOWER, COMMUNICATION, BUBBLES, IMBALANCE, STORAGE, OTHER, START)
SHARES = (COMPUTING, *LOSSES)

_OF_PHASE = {  # of a rank
    "input and output": STORAGE,
    "waiting for work": IMBALANCE,
    "waiting as a spare": IMBALANCE,
    "waiting for the leader": BUBBLES,
    "waiting for results": BUBBLES,
    "pipeline": BUBBLES,
}
_MIXED = ("forward", "sampling")  # computing and sums over tp ranks together


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
    for rank in ranks:
        for name, seconds in (*_of_run(rank, run_s).items(), (STORAGE, merge_s), (START, wall_s - run_s - merge_s)):
            total[name] += seconds
    return total


def _of_run(rank: Mapping[str, Any], run_s: float) -> dict[str, float]:
    """Shares of one rank's part of the phase `run`; what it does not account for is other."""
    found = dict.fromkeys(SHARES, 0.0)
    for name, seconds in _parts(rank):
        found[name] += max(seconds, 0.0)
    waiting = BUBBLES if rank.get("place", {}).get("pp", 1) > 1 else COMMUNICATION
    idle_s = min(_idle_at_the_end(rank, run_s) - found[IMBALANCE], found[waiting])
    if idle_s > 0:  # a follower waits for its leader while that one waits for work
        found.update({waiting: found[waiting] - idle_s, IMBALANCE: found[IMBALANCE] + idle_s})
    accounted = sum(found.values())
    if accounted > run_s:  # clocks of two phases that do not begin together
        return {name: seconds * run_s / accounted for name, seconds in found.items()}
    found[OTHER] += run_s - accounted
    return found


def _parts(rank: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    seconds, place = rank["seconds"], rank.get("place", {})
    is_staged, is_split = place.get("pp", 1) > 1, place.get("tp", 1) > 1
    mixed, kernels = sum(seconds.get(name, 0.0) for name in _MIXED), sum(rank["kernels"].values())
    summing = min(rank.get("traffic", {}).get("seconds", mixed - kernels if is_split else 0.0), mixed)
    yield COMMUNICATION, summing
    yield COMPUTING, min(kernels or mixed, mixed - summing)  # some kernels have no clock
    for phase, name in _OF_PHASE.items():
        if name == BUBBLES and not is_staged:
            name = COMMUNICATION if is_split else OTHER
        yield name, seconds.get(phase, 0.0)


def _idle_at_the_end(rank: Mapping[str, Any], run_s: float) -> float:
    """Seconds since its last step; 0 where the report does not say."""
    last = rank.get("timeline", {}).get("last_step_time", 0.0)
    return max(0.0, run_s - (last - rank["began"])) if last and "began" in rank else 0.0


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
