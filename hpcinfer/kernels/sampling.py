"""From logits to the next id on CPUs, whose kernels share it: changes of logits, filters, draws, log-probabilities.

A row is the logits of one position over contiguous vocabulary ids, float32. Only kernels' exp and log and elementwise
arithmetic are used, sums run in one order: the same row gives the same id everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hpcinfer.kernels.protocol import Array, Changes, Draw, GrainStats, Scores
from hpcinfer.partition.grains import Span, tree_reduce

COLDEST, HOTTEST = 1e-20, 1e20  # temperatures beyond choose the same ids and leave the range of float32
_SOME_LIKELY = (64, 1024)  # ids that mostly hold top_p of the probability: looked at before all
_BLOCK = 256  # weights that are added together first


class RowMath(Protocol):
    """What kernels of a CPU do with logits. Bits of a result depend on nothing but its operands."""

    def grain_stats(self, logits: np.ndarray, grain_sizes: tuple[int, ...]) -> GrainStats:
        """See `Kernels.grain_stats`."""

    def largest(self, row: np.ndarray, count: int) -> np.ndarray:
        """Places int64 of the `count` largest values of float32 [V]: value descending, place ascending."""

    def log(self, x: np.ndarray) -> np.ndarray:
        """Natural logarithm of float32 or float64."""

    def exp(self, x: np.ndarray) -> np.ndarray:
        """Exponential in float32; 0 below -86.5."""


@dataclass(frozen=True)
class Here:
    """Arrays that have been on the host."""

    arrays: list[np.ndarray]
    is_late = False

    def wait(self) -> list[np.ndarray]:
        """Give them at once."""
        return self.arrays


class RowSampling(RowMath, Protocol):
    """What kernels of all CPUs do with logits in one way; these may be numpy arrays or tensors."""

    def take(self, array: Array, rows: list[int]) -> Array:
        """Some rows of an array."""
        return array[rows]

    def join_grains(self, parts: list[Array]) -> Array:
        """Concatenate logits along their grains."""
        return np.concatenate(parts, axis=1)

    def draw(self, logits: Array, grain_sizes: tuple[int, ...], draws: Sequence[Draw]) -> np.ndarray:
        """Choose an id of each row of [R, G, U]."""
        return draw_rows(np.asarray(logits), grain_sizes, draws, self)

    def score(self, logits: Array, grain_sizes: tuple[int, ...], ids: np.ndarray, num_top: int) -> Scores:
        """What log-probabilities of an id of each row are made of."""
        return score_rows(np.asarray(logits), grain_sizes, ids, num_top, self)

    def fetch(self, arrays: list[Array]) -> Here:
        """Give the arrays, which are on the host."""
        return Here([np.asarray(array) for array in arrays])


def compact(logits: np.ndarray, grain_sizes: tuple[int, ...]) -> np.ndarray:
    """Drop padded columns: [R, G, U] to a new [R, ids]."""
    return np.concatenate([logits[:, g, :size] for g, size in enumerate(grain_sizes)], axis=1)


def change_row(row: np.ndarray, changes: Changes) -> np.ndarray:
    """Change some logits of a row, in place, and give it back."""
    places, biases, factors, penalties = changes
    with np.errstate(invalid="ignore"):  # infinities of a broken row
        values = row[places] + biases
        row[places] = np.where(values > 0, values / factors, values * factors) - penalties
    return row


def draw_rows(
    logits: np.ndarray, grain_sizes: tuple[int, ...], draws: Sequence[Draw], kernels: RowMath
) -> np.ndarray:
    """Choose an id of each row of [R, G, U]; see `Kernels.draw`."""
    ids = np.empty(len(draws), np.int64)
    for i, draw in enumerate(draws):
        if draw.known_id >= 0:
            ids[i] = draw.known_id
            continue
        row = compact(logits[i : i + 1], grain_sizes)[0]
        ids[i] = sample(row if draw.changes is None else change_row(row, draw.changes), draw, kernels)
    return ids


def sample(row: np.ndarray, draw: Draw, kernels: RowMath) -> int:
    """Choose an id from changed logits [V]: temperature, min_p, top_k, top_p, in this order.

    Probabilities are added by id where all ids take part, else from the highest down.
    NaN counts as minus infinity.
    """
    best = int(row.argmax())
    if np.isnan(row[best]):  # which numpy takes for the largest
        row = np.where(np.isnan(row), np.float32(-np.inf), row)
        best = int(row.argmax())
    if draw.temperature == 0.0 or not np.isfinite(row[best]):  # every id forbidden: no distribution to draw from
        return best
    likely = _Distribution(row, row[best], draw, kernels)
    if draw.top_k > 0:
        ids, sums = likely.most_likely()
    elif draw.top_p < 1.0:
        ids, sums = likely.nucleus()
    else:
        return _draw_by_id(likely.weights(row), draw.u)
    index = min(int(np.searchsorted(sums, draw.u * sums[-1], side="right")), len(sums) - 1)
    return int(ids[index])


def _draw_by_id(weights: np.ndarray, u: float) -> int:
    """The id where the running sum of weights passes the share `u` of all: first the block, then the id in it."""
    sums = np.cumsum(_block_sums(weights))
    wanted = u * sums[-1]
    block = min(int(np.searchsorted(sums, wanted, side="right")), len(sums) - 1)
    start = block * _BLOCK
    inside = np.cumsum(weights[start : start + _BLOCK], dtype=np.float64)
    below = sums[block - 1] if block else 0.0
    last = np.flatnonzero(inside < inside[-1])  # rounding must not choose what has no weight
    return start + min(int(np.searchsorted(inside, wanted - below, side="right")), len(last))


def _block_sums(weights: np.ndarray) -> np.ndarray:
    """Sums of each _BLOCK values in float64, in a tree of elementwise additions: the same bits on every machine."""
    blocks = np.zeros((-(-len(weights) // _BLOCK), _BLOCK))
    blocks.reshape(-1)[: len(weights)] = weights
    half = _BLOCK
    while half > 1:
        half //= 2
        blocks[:, :half] += blocks[:, half : 2 * half]
    return blocks[:, 0]


@dataclass(frozen=True)
class _Distribution:
    """A row to draw from, its highest value, and how. Results are ids by logit descending, and sums of weights."""

    row: np.ndarray
    peak: np.float32
    draw: Draw
    kernels: RowMath

    def weights(self, values: np.ndarray) -> np.ndarray:
        """Probabilities in units of the highest one; zero where min_p forbids."""
        temperature = np.float32(min(max(self.draw.temperature, COLDEST), HOTTEST))
        weights = self.kernels.exp((values - self.peak) / temperature)
        if self.draw.min_p > 0.0:
            weights[weights < np.float32(self.draw.min_p)] = 0.0
        return weights

    def most_likely(self) -> tuple[np.ndarray, np.ndarray]:
        """What top_k leaves, and of that top_p."""
        ids = self.kernels.largest(self.row, self.draw.top_k)
        sums = np.cumsum(self.weights(self.row[ids]), dtype=np.float64)
        return ids, _head(sums, self.draw.top_p * sums[-1]) if self.draw.top_p < 1.0 else sums

    def nucleus(self) -> tuple[np.ndarray, np.ndarray]:
        """What top_p leaves: only as many ids are sorted as are needed."""
        weights = self.weights(self.row)
        wanted = self.draw.top_p * np.cumsum(_block_sums(weights))[-1]
        for count in (*_SOME_LIKELY, len(self.row)):
            ids = self.kernels.largest(self.row, count)
            sums = np.cumsum(weights[ids], dtype=np.float64)
            if sums[-1] >= wanted:
                break
        return ids, _head(sums, wanted)


def _head(sums: np.ndarray, wanted: float) -> np.ndarray:
    """Sums up to the first that reaches what is wanted."""
    return sums[: int(np.searchsorted(sums, wanted)) + 1]


def score_rows(
    logits: np.ndarray, grain_sizes: tuple[int, ...], ids: np.ndarray, num_top: int, kernels: RowMath
) -> Scores:
    """What log-probabilities of an id of each row of [R, G, U] are made of; see `Kernels.score`."""
    ends = np.cumsum(grain_sizes)
    grains = np.searchsorted(ends, ids, side="right")
    values = logits[np.arange(len(ids)), grains, ids - (ends - grain_sizes)[grains]]
    count = min(num_top, int(ends[-1]))
    top_ids, top_values = np.empty((len(ids), count), np.int64), np.empty((len(ids), count), np.float32)
    for i in range(len(ids) if count else 0):
        row = compact(logits[i : i + 1], grain_sizes)[0]
        top_ids[i] = kernels.largest(row, count)
        top_values[i] = row[top_ids[i]]
    return Scores(log_totals(logits, grain_sizes, kernels), values, top_ids, top_values)


def log_totals(logits: np.ndarray, grain_sizes: tuple[int, ...], kernels: RowMath) -> np.ndarray:
    """Log of the sum of exponentials of each row of [R, G, U], finished in the tree over the grains. Float64 [R]."""
    stats = kernels.grain_stats(logits, grain_sizes)
    peak = stats.maxima.max(axis=1)
    with np.errstate(invalid="ignore"):  # infinities of a broken row
        parts = stats.exp_sums * kernels.exp(stats.maxima - peak[:, None])
    nodes = {Span(g, g + 1): parts[:, g] for g in range(parts.shape[1])}
    total: np.ndarray = tree_reduce(nodes, Span(0, parts.shape[1]), np.add)
    return peak.astype(np.float64) + kernels.log(total).astype(np.float64)
