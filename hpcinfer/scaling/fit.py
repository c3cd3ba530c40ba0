"""Amdahl's law and the Universal Scalability Law, fitted by least squares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_PARAMETERS = {"Amdahl": 2, "USL": 3}


class Fit(NamedTuple):
    """Throughput of N ranks: rate x N / (1 + contention (N - 1) + coherency N (N - 1)).

    Source: Gunther, A General Theory of Computational Scalability, arXiv:0808.1431; Amdahl's law has no coherency.
    """

    law: str  # Amdahl or USL
    rate: float  # of one rank
    contention: float
    coherency: float
    residual: float  # root of the mean square of relative errors
    num_points: int  # different N
    largest: int  # N that was measured

    def at(self, ranks: float) -> float:
        """Throughput that it predicts."""
        return self.rate * ranks / (1 + self.contention * (ranks - 1) + self.coherency * ranks * (ranks - 1))

    @property
    def best(self) -> float:
        """Ranks from which on it falls; infinite where it never does."""
        if self.coherency <= 0:
            return float("inf")
        return max(1.0, float(np.sqrt((1 - self.contention) / self.coherency)))

    def __str__(self) -> str:
        spare = "" if self.num_points > _PARAMETERS[self.law] else ", as many as it has parameters"
        terms = [f"rate {self.rate:.1f}/s", f"contention {self.contention:.4f}"]
        if self.law == "USL":
            terms.append(f"coherency {self.coherency:.6f}")
        best = f"; highest at {self.best:.0f} ranks" if self.best < float("inf") else ""
        points = f"residual {100 * self.residual:.1f} % of {self.num_points} points{spare}"
        return f"{self.law}: {', '.join(terms)}; {points}{best}"


def fit(law: str, ranks: Sequence[int], rates: Sequence[float]) -> Fit | None:
    """Fit a law to throughputs; None with fewer different N than parameters, or without a rate.

    N / X(N) is linear in 1/rate, contention/rate and coherency/rate; squares of relative errors are added. Contention
    is between 0 and 1, coherency not negative: of the solutions within this region and on each of its edges the best
    valid one is taken, which is the minimum wherever the rate of one rank is finite there.

    Args:
        law: Amdahl or USL.
        ranks: N of each measurement.
        rates: throughputs; a law has none that is 0.
    """
    num_parameters, num_points = _PARAMETERS[law], len(set(ranks))
    if num_points < num_parameters or min(rates) <= 0:
        return None
    n, x = np.asarray(ranks, dtype=float), np.asarray(rates, dtype=float)
    columns = np.stack([np.ones_like(n), n - 1, n * (n - 1)][:num_parameters], axis=1) * (x / n)[:, None]
    square, found = min(_candidates(columns))
    inverse, contention, coherency = (*found, 0.0)[:3]
    return Fit(law, 1 / inverse, contention / inverse, coherency / inverse, math.sqrt(square / len(x)), num_points,
               max(ranks))  # fmt: skip


def _candidates(columns: np.ndarray) -> list[tuple[float, list[float]]]:
    """Solutions within the region and on each of its edges that are valid, each with its squared error."""
    one, contended, *coherent = columns.T
    found = []
    for first in ([one], [one, contended], [one + contended]):
        for more in (coherent[:0], coherent):
            values = np.linalg.lstsq(np.stack([*first, *more], axis=1), np.ones(len(one)), rcond=None)[0].tolist()
            inverse = values[0]
            share = values[1] if len(first) == 2 else inverse if first[0] is not one else 0.0
            full = [inverse, share, *([values[-1] if more else 0.0] if coherent else [])]
            if inverse > 0 and 0 <= share <= inverse and min(full) >= 0:
                found.append((float(np.sum((columns @ full - 1) ** 2)), full))
    return found
