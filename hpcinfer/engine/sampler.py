"""The sampler: one rank of the last stage samples, the others are told.

Logits live in vocabulary grains spread over tp. Rows that are greedy and need no log-probabilities travel as one
(value, id) pair per rank; the others as whole rows. Either way the root sees the same numbers for every tp.
"""

import json
from typing import NamedTuple

import numpy as np

from hpcinfer.comm.protocol import Collectives
from hpcinfer.engine.batch import LogitRow
from hpcinfer.engine.logits import TokenScore, adjust, adjusts, log_total, sample, score, uniform
from hpcinfer.kernels.protocol import Kernels
from hpcinfer.partition.grains import grain_ranges, grain_runs

_PAIR = np.dtype([("value", np.float32), ("token_id", np.int32)])


class RowResult(NamedTuple):
    """What came of one logit row."""

    token_id: int  # the sampled token, or the prompt token that was scored
    score: TokenScore | None  # where log-probabilities are asked for


class VocabShards(NamedTuple):
    """How the vocabulary is cut: ids of each grain, grains of each tp rank."""

    grain_ids: list[range]
    runs: list[range]

    def first_id(self, tp_rank: int) -> int:
        """Lowest id of a rank."""
        return self.grain_ids[self.runs[tp_rank].start].start

    def sizes(self, run: range) -> tuple[int, ...]:
        """True ids in each grain of a run."""
        return tuple(len(self.grain_ids[g]) for g in run)


class Sampler:
    """Turns the logits of a batch into tokens. Collective over tp of the last stage."""

    def __init__(self, kernels: Kernels, group: Collectives, vocab_size: int, grains: int, seed: int) -> None:
        self._kernels, self._group, self._seed = kernels, group, seed
        self._shards = VocabShards(grain_ranges(vocab_size, grains), grain_runs(grains, group.size))
        self._run = self._shards.runs[group.rank]

    def sample(self, logits: np.ndarray, rows: list[LogitRow], eos_ids: tuple[int, ...]) -> list[RowResult]:
        """Sample or score every row.

        Collective over tp of the last stage.

        Args:
            logits: float32 [R, G, U] of this rank's grains.
            rows: what is wanted of each, R of them.
            eos_ids: end-of-sequence ids, kept away until min_tokens.

        Returns:
            R results on the root (tp rank 0), nothing elsewhere.
        """
        is_short = np.asarray([_is_short(row) for row in rows], bool)
        short = self._best_pairs(logits[is_short], [row for row in rows if _is_short(row)], eos_ids)
        whole = self._whole_rows(logits[~is_short])
        if self._group.rank != 0:
            return []
        long_results = iter(self._finish_rows(whole, [row for row in rows if not _is_short(row)], eos_ids))
        short_results = iter(short)
        return [next(short_results) if is_pair else next(long_results) for is_pair in is_short]

    def _best_pairs(self, logits: np.ndarray, rows: list[LogitRow], eos_ids: tuple[int, ...]) -> list[RowResult]:
        if not rows:
            return []
        local, first_id = compact(logits, self._shards.sizes(self._run)), self._shards.first_id(self._group.rank)
        pairs = np.empty(len(rows), _PAIR)
        for i, row in enumerate(rows):
            values = local[i]
            if adjusts(row.sequence.request.sampling, row.sequence.num_output):
                values = adjust(values, first_id, row.sequence, eos_ids)
            best = int(values.argmax()) if len(values) else 0
            pairs[i] = (values[best] if len(values) else -np.inf, first_id + best)
        gathered = np.empty((self._group.size, len(rows)), _PAIR)
        counts = [2 * len(rows)] * self._group.size
        self._group.gather(pairs.view(np.float32), gathered.view(np.float32), counts)
        winners = gathered["value"].argmax(axis=0)  # the first of equals: the lowest id
        return [RowResult(int(gathered["token_id"][rank, i]), None) for i, rank in enumerate(winners)]

    def _whole_rows(self, logits: np.ndarray) -> np.ndarray:
        """Gather rows on the root as [R, G, U] over all grains."""
        num_rows, _, unit = logits.shape
        if num_rows == 0 or self._group.size == 1:
            return logits
        counts = [num_rows * len(run) * unit for run in self._shards.runs]
        buffer = np.empty(sum(counts) if self._group.rank == 0 else 0, np.float32)
        self._group.gather(np.ascontiguousarray(logits), buffer, counts)
        if self._group.rank != 0:
            return logits
        ends = np.cumsum(counts)
        parts = [
            buffer[end - count : end].reshape(num_rows, len(run), unit)
            for end, count, run in zip(ends, counts, self._shards.runs, strict=True)
        ]
        return np.concatenate(parts, axis=1)

    def _finish_rows(self, whole: np.ndarray, rows: list[LogitRow], eos_ids: tuple[int, ...]) -> list[RowResult]:
        if not rows:
            return []
        sizes = self._shards.sizes(range(len(self._shards.grain_ids)))
        log_sums = log_total(whole, sizes, self._kernels)
        return [
            self._finish_row(values, float(log_sum), row, eos_ids)
            for values, log_sum, row in zip(compact(whole, sizes), log_sums, rows, strict=True)
        ]

    def _finish_row(self, values: np.ndarray, log_sum: float, row: LogitRow, eos_ids: tuple[int, ...]) -> RowResult:
        request, sequence = row.sequence.request, row.sequence
        params = request.sampling
        if row.samples:
            adjusted = values
            if adjusts(params, sequence.num_output):
                adjusted = adjust(values, 0, sequence, eos_ids)
            seed = self._seed if params.seed is None else params.seed
            u = uniform(seed, request.row, sequence.choice, row.position + 1)
            token_id = sample(adjusted, params, u, self._kernels)
        else:
            token_id = request.prompt_ids[row.position + 1]
        if params.logprobs is None:
            return RowResult(token_id, None)
        return RowResult(token_id, score(values, log_sum, token_id, params.logprobs))


def compact(logits: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Drop padded columns: [R, G, U] to [R, ids]."""
    return np.concatenate([logits[:, g, :size] for g, size in enumerate(sizes)], axis=1)


def encode_results(results: list[RowResult]) -> bytes:
    """Encode for the way to the leader: ids, then scores as JSON (floats survive exactly)."""
    ids = np.asarray([result.token_id for result in results], np.int32).tobytes()
    scores = [result.score for result in results]
    return ids + (json.dumps(scores).encode() if any(scores) else b"")


def decode_results(data: bytes, num_rows: int) -> list[RowResult]:
    """Decode what `encode_results` made."""
    ids = np.frombuffer(data, np.int32, num_rows).tolist()
    scores = json.loads(data[4 * num_rows :]) if len(data) > 4 * num_rows else [None] * num_rows
    return [RowResult(i, s and _token_score(*s)) for i, s in zip(ids, scores, strict=True)]


def _token_score(token_id: int, logprob: float, top: list[list[float]]) -> TokenScore:
    return TokenScore(token_id, logprob, tuple((int(i), value) for i, value in top))


def _is_short(row: LogitRow) -> bool:
    params = row.sequence.request.sampling
    return row.samples and params.is_greedy and params.logprobs is None
