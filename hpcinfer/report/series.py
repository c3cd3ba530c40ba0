"""Timelines of replicas on one time axis, with few points: zero is the start of the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

MOST_POINTS = 200


class Series(NamedTuple):
    """Values of one replica at equal steps of time."""

    replica: int
    interval_s: float  # of all points but the last, which takes in what would be less than half of one
    tokens_per_s: list[float]  # output tokens
    batch_sequences: list[float]  # of a step, on average
    batch_tokens: list[float]  # of a step, on average
    kv_use: list[float]  # largest share of the blocks that were held


def all_series(ranks: Sequence[dict[str, Any]]) -> list[Series]:
    """The series of all leaders; of a replica whose leader has died one for each leader that lives."""
    run_s = max((rank["phases"].get("run", 0.0) for rank in ranks), default=0.0)
    leaders = [rank for rank in ranks if "timeline" in rank and rank.get("place")]
    finest = max((rank["timeline"]["interval_s"] for rank in leaders), default=0.25)
    interval_s = max(finest, run_s / MOST_POINTS)
    return [_series(rank, interval_s, run_s) for rank in leaders]


def total_tokens_per_s(series: Sequence[Series]) -> list[float]:
    """Output tokens per second of all replicas together."""
    return [sum(values) for values in zip(*(each.tokens_per_s for each in series), strict=True)]


def _series(rank: dict[str, Any], interval_s: float, run_s: float) -> Series:
    line, num_points = rank["timeline"], max(1, math.floor(run_s / interval_s + 0.5 + 1e-9))
    first = line["start_time"] - rank["began"]
    grid = _Grid(first, line["interval_s"], interval_s, num_points, run_s)
    steps = grid.sums(line["steps"])
    widths = [*[interval_s] * (num_points - 1), run_s - (num_points - 1) * interval_s or interval_s]
    return Series(
        rank["place"]["replica"], interval_s,
        [tokens / width for tokens, width in zip(grid.sums(line["tokens"]), widths, strict=True)],
        _means(grid.sums(line["sequences"]), steps), _means(grid.sums(line["batch_tokens"]), steps),
        [held / max(1, rank["num_blocks"]) for held in grid.maxima(line["blocks"])],
    )  # fmt: skip


class _Grid(NamedTuple):
    """From intervals of one width to wider ones that begin at zero; the last has half to one and a half of it."""

    first_s: float
    from_s: float
    to_s: float
    num_points: int
    run_s: float  # what touches an interval happened before

    def sums(self, values: Sequence[float]) -> list[float]:
        """Share each value among the points that its interval touches; what is outside counts at the edge."""
        found = [0.0] * self.num_points
        for i, value in enumerate(values):
            if value:
                start, stop = self._ends(i)
                for point in range(math.floor(start), math.ceil(stop)):
                    overlap = min(stop, point + 1) - max(start, point)
                    found[self._inside(point)] += value * overlap / (stop - start)
        return found

    def maxima(self, values: Sequence[float]) -> list[float]:
        """The largest value of the intervals that touch each point."""
        found = [0.0] * self.num_points
        for i, value in enumerate(values):
            start, stop = self._ends(i)
            for point in range(math.floor(start), math.ceil(stop)):
                found[self._inside(point)] = max(found[self._inside(point)], value)
        return found

    def _ends(self, i: int) -> tuple[float, float]:
        """Where an interval begins and ends, in steps of the wider ones; it ends with the run."""
        start = self.first_s + i * self.from_s
        stop = start + self.from_s
        if start < self.run_s - 1e-6:
            stop = min(stop, self.run_s)
        return start / self.to_s, stop / self.to_s

    def _inside(self, point: int) -> int:
        return min(max(point, 0), self.num_points - 1)


def _means(sums: Sequence[float], steps: Sequence[float]) -> list[float]:
    return [total / count if count > 1e-6 else 0.0 for total, count in zip(sums, steps, strict=True)]
