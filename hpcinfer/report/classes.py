"""The time of a rank in five classes, which add up to its run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hpcinfer.report.metrics import IDLE, SPARE, STAGING, WEIGHTS

COMPUTE, COMMUNICATION, WAITING = "compute", "communication", "waiting"
INPUT_OUTPUT, SCHEDULING = "input and output", "scheduling"
CLASSES = (COMPUTE, COMMUNICATION, WAITING, INPUT_OUTPUT, SCHEDULING)
RESULTS, LEADER = "waiting for results", "waiting for the leader"


def time_classes(rank: dict[str, Any]) -> dict[str, float]:
    """Split the seconds that a rank has run.

    Args:
        rank: its report: phases, seconds, kernels, traffic.

    Returns:
        Seconds by class: compute is inside array functions, communication in sums over tensor-parallel ranks and in
        hidden states between stages, waiting for peers in both included. Waiting for weights and
        writing the stage are input and output.
        What is in no other class is scheduling.
    """
    seconds, run_s = rank["seconds"], rank["phases"].get("run", 0.0)
    weights_s = seconds.get(WEIGHTS, 0.0)
    model_s = max(0.0, _sum(seconds, ("forward", "sampling")) - weights_s)
    reducing_s = min(rank.get("traffic", {}).get("seconds", 0.0), model_s)
    kernels_s = sum(rank["kernels"].values()) or model_s - reducing_s  # some kernels have no clock
    found = {
        COMPUTE: min(kernels_s, model_s - reducing_s),
        COMMUNICATION: reducing_s + seconds.get("pipeline", 0.0),
        WAITING: _sum(seconds, (LEADER, RESULTS, IDLE, SPARE)),
        INPUT_OUTPUT: _sum(seconds, ("input and output", STAGING)) + weights_s,
    }
    return {**found, SCHEDULING: max(0.0, run_s - sum(found.values()))}


def mean_shares(classes: Iterable[dict[str, float]]) -> dict[str, float]:
    """Share of each class of the time of some ranks together; all 0 if they have none."""
    total = dict.fromkeys(CLASSES, 0.0)
    for each in classes:
        for name in CLASSES:
            total[name] += each[name]
    whole = sum(total.values())
    return {name: value / whole if whole else 0.0 for name, value in total.items()}


def _sum(seconds: dict[str, float], names: Iterable[str]) -> float:
    return sum(seconds.get(name, 0.0) for name in names)
