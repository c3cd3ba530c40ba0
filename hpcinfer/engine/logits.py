"""From logits to the next token: penalties, filters, the counter-based generator. Pure functions of one row each.

A row is the logits of one position over contiguous vocabulary ids, float32. Only kernels' exp and log and
elementwise arithmetic are used, sums run in one order: the same row gives the same token everywhere.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpcinfer.config import SamplingParams
from hpcinfer.kernels.protocol import Kernels
from hpcinfer.partition.grains import Span, tree_reduce

if TYPE_CHECKING:
    from hpcinfer.engine.sequence import Sequence

_KEY = struct.Struct("<qqqq")
_SOME_LIKELY = (64, 1024)  # tokens that mostly hold top_p of the probability: looked at before all
_BLOCK = 256  # weights that are added together first
_COLDEST, _HOTTEST = 1e-20, 1e20  # temperatures beyond choose the same tokens and leave the range of float32


class TokenScore(NamedTuple):
    """Log-probability of a token, and of the most likely ones at its position: highest first, then lowest id."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def uniform(seed: int, row: int, choice: int, position: int) -> float:
    """Draw from [0, 1), a function of the four numbers alone (a hash in counter mode, 53 bits)."""
    digest = blake2b(_KEY.pack(seed, row, choice, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def adjust(row: np.ndarray, first_id: int, sequence: Sequence, eos_ids: tuple[int, ...]) -> np.ndarray:
    """Apply min_tokens, logit_bias and penalties to ids [first_id, first_id + len(row)). Returns a new row."""
    params, row = sequence.request.sampling, row.copy()
    if sequence.num_output < params.min_tokens:
        row[_inside((*eos_ids, *params.stop_token_ids), first_id, len(row))] = -np.inf
    for token_id, bias in params.logit_bias:
        if first_id <= token_id < first_id + len(row):
            row[token_id - first_id] += np.float32(bias)
    if params.repetition_penalty != 1.0:
        seen = _inside(sequence.token_ids, first_id, len(row))
        factor = np.float32(params.repetition_penalty)
        row[seen] = np.where(row[seen] > 0, row[seen] / factor, row[seen] * factor)
    if params.presence_penalty or params.frequency_penalty:
        ids, counts = np.unique(np.asarray(sequence.output_ids, np.int64), return_counts=True)
        is_here = (ids >= first_id) & (ids < first_id + len(row))
        penalty = params.frequency_penalty * counts[is_here] + params.presence_penalty
        row[ids[is_here] - first_id] -= penalty.astype(np.float32)
    return row


def sample(row: np.ndarray, params: SamplingParams, u: float, kernels: Kernels) -> int:
    """Choose a token id from adjusted logits [V]: temperature, min_p, top_k, top_p, in this order; `u` in [0, 1).

    Probabilities are added by id where all tokens take part, else from the highest down.
    NaN counts as minus infinity.
    """
    best = int(row.argmax())
    if np.isnan(row[best]):  # which numpy takes for the largest
        row = np.where(np.isnan(row), np.float32(-np.inf), row)
        best = int(row.argmax())
    if params.is_greedy or not np.isfinite(row[best]):  # every token forbidden: no distribution to draw from
        return best
    draw = _Draw(row, row[best], params, kernels)
    if params.top_k > 0:
        ids, sums = draw.most_likely()
    elif params.top_p < 1.0:
        ids, sums = draw.nucleus()
    else:
        return _draw_by_id(draw.weights(row), u)
    index = min(int(np.searchsorted(sums, u * sums[-1], side="right")), len(sums) - 1)
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
class _Draw:
    """A row to draw from, its highest value, and how. Results are ids by logit descending, and sums of weights."""

    row: np.ndarray
    peak: np.float32
    params: SamplingParams
    kernels: Kernels

    def weights(self, values: np.ndarray) -> np.ndarray:
        """Probabilities in units of the highest one; zero where min_p forbids."""
        temperature = np.float32(min(max(self.params.temperature, _COLDEST), _HOTTEST))
        weights = self.kernels.exp((values - self.peak) / temperature)
        if self.params.min_p > 0.0:
            weights[weights < np.float32(self.params.min_p)] = 0.0
        return weights

    def most_likely(self) -> tuple[np.ndarray, np.ndarray]:
        """What top_k leaves, and of that top_p."""
        ids = self.kernels.largest(self.row, self.params.top_k)
        sums = np.cumsum(self.weights(self.row[ids]), dtype=np.float64)
        return ids, _head(sums, self.params.top_p * sums[-1]) if self.params.top_p < 1.0 else sums

    def nucleus(self) -> tuple[np.ndarray, np.ndarray]:
        """What top_p leaves: only as many ids are sorted as are needed."""
        weights = self.weights(self.row)
        wanted = self.params.top_p * np.cumsum(_block_sums(weights))[-1]
        for count in (*_SOME_LIKELY, len(self.row)):
            ids = self.kernels.largest(self.row, count)
            sums = np.cumsum(weights[ids], dtype=np.float64)
            if sums[-1] >= wanted:
                break
        return ids, _head(sums, wanted)


def _head(sums: np.ndarray, wanted: float) -> np.ndarray:
    """Sums up to the first that reaches what is wanted."""
    return sums[: int(np.searchsorted(sums, wanted)) + 1]


def log_total(grains: np.ndarray, grain_sizes: tuple[int, ...], kernels: Kernels) -> np.ndarray:
    """Log of the sum of exponentials of each row of [R, G, U], finished in the tree over the grains. Float64 [R]."""
    stats = kernels.grain_stats(grains, grain_sizes)
    peak = stats.maxima.max(axis=1)
    with np.errstate(invalid="ignore"):  # infinities of a broken row
        parts = stats.exp_sums * kernels.exp(stats.maxima - peak[:, None])
    nodes = {Span(g, g + 1): parts[:, g] for g in range(parts.shape[1])}
    total: np.ndarray = tree_reduce(nodes, Span(0, parts.shape[1]), np.add)
    return peak.astype(np.float64) + kernels.log(total).astype(np.float64)


def score(row: np.ndarray, log_sum: float, token_id: int, num_top: int, kernels: Kernels) -> TokenScore:
    """Log-probabilities of a token and of the `num_top` most likely ones, from raw logits [V]."""
    ids = kernels.largest(row, num_top).tolist() if num_top else []
    top = tuple((i, float(row[i]) - log_sum) for i in ids)
    return TokenScore(token_id, float(row[token_id]) - log_sum, top)


def _inside(token_ids: tuple[int, ...] | list[int], first_id: int, length: int) -> np.ndarray:
    local = np.unique(np.asarray(token_ids, np.int64)) - first_id
    return local[(local >= 0) & (local < length)]
