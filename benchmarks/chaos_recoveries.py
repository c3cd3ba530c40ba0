"""Recoveries inside a job, from the reports of its ranks and the moments of its faults: how long each phase took."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_WINDOW_S = 1.0  # over which rates are means
_BEFORE_S = 2.0  # a rate before the fault is the mean over so long
_NEARLY = 0.9

Rank = dict[str, Any]  # its report


def recoveries(faults: Sequence[float], reports: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Describe each recovery that came to a new token.

    A fault that hits survivors while they recover prolongs the recovery, whose time counts from the first fault.
    """
    ranks = [rank for path in reports for rank in _read(path).get("ranks", [])]
    found = [(each, rank) for rank in ranks for each in rank.get("recoveries", []) if each.get("first_token_time")]
    last = 0.0
    for recovery, leader in sorted(found, key=lambda pair: pair[0]["found_time"]):
        seen, token = recovery["found_time"], recovery["first_token_time"]
        before = [fault for fault in faults if fault <= seen]
        if before:
            first = next((fault for fault in before if fault > last), before[-1])
            others = [rank for rank in ranks if _replica(rank) != recovery["replica"]]
            yield {
                "replica": recovery["replica"], "mesh": recovery["mesh"], "cause": recovery["cause"],
                "detect_s": seen - before[-1], "agree_s": recovery["agree_s"], "refill_s": recovery.get("refill_s"),
                "first_token_s": token - seen - recovery["agree_s"] - recovery.get("refill_s", 0.0),
                "fault_to_token_s": token - first, "fault_to_90_percent_s": _regained(leader, first),
                "others_before_s": longest_step(others, 2 * first - token, first),
                "others_meanwhile_s": longest_step(others, first, token),
            }  # fmt: skip
        last = seen


def longest_step(ranks: Sequence[Rank], begin: float, end: float) -> float | None:
    """Longest step of some leaders in a time; None if there is none."""
    longest = [0.0]
    for line in (rank["timeline"] for rank in ranks if "timeline" in rank):
        edges = line["start_time"] + line["interval_s"] * np.arange(len(line["steps"]) + 1)
        is_inside = (edges[1:] > begin) & (edges[:-1] < end)
        longest += np.array(line["longest_s"])[is_inside].tolist()
    return max(longest) or None


def _regained(leader: Rank, fault: float) -> float | None:
    """Time until nine tenths of the rate before, where the leader has lived through both."""
    line = leader.get("timeline")
    if not line or line["start_time"] > fault - _BEFORE_S:
        return None
    ends = line["start_time"] + line["interval_s"] * np.arange(1, len(line["tokens"]) + 1)
    total = np.cumsum(line["tokens"])
    before = np.interp(fault, ends, total) - np.interp(fault - _BEFORE_S, ends, total)
    rates = (total - np.interp(ends - _WINDOW_S, ends, total)) / _WINDOW_S
    is_regained = (ends > fault) & (rates >= _NEARLY * before / _BEFORE_S)
    return float(ends[is_regained][0] - fault) if is_regained.any() else None


def _replica(rank: Rank) -> int | None:
    return rank.get("place", {}).get("replica")


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(ValueError):  # its writer was killed
        return json.loads(path.read_text())
    return {}
