"""The sampler: one rank of the last stage samples, the others are told.

Logits live in vocabulary grains spread over tp. Rows that are greedy and need no log-probabilities travel as one
(value, id) pair per rank; the others as whole rows. Either way the root sees the same numbers for every tp.
"""

import json
from typing import NamedTuple

import numpy as np

from hpcinfer.comm.operations import Operations
from hpcinfer.engine.batch import LogitRow
from hpcinfer.engine.logits import TokenScore, adjust, log_total, sample, score, uniform
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

    def __init__(self, kernels: Kernels, group: Operations, vocab_size: int, grains: int, seed: int) -> None:
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
        short = [i for i, row in enumerate(rows) if row.sequence.takes_best or _is_short(row)]
        ids = self._best_ids(logits, rows, short, eos_ids) if short else []
        if len(short) == len(rows):
            return [RowResult(token_id, None) for token_id in ids]
        is_short = set(short)
        long = [i for i in range(len(rows)) if i not in is_short]
        whole = self._whole_rows(_rows_of(logits, long))
        if self._group.rank != 0:
            return []
        results = dict(zip(short, (RowResult(token_id, None) for token_id in ids), strict=True))
        results |= zip(long, self._finish_rows(whole, [rows[i] for i in long], eos_ids), strict=True)
        return [results[i] for i in range(len(rows))]

    def _best_ids(
        self, logits: np.ndarray, rows: list[LogitRow], short: list[int], eos_ids: tuple[int, ...]
    ) -> list[int]:
        """Ids of the largest logits of short rows; none but on the root."""
        sizes, first_id = self._shards.sizes(self._run), self._shards.first_id(self._group.rank)
        values, places = self._kernels.argmax(logits, sizes)
        for i in short:
            sequence = rows[i].sequence
            if not sequence.takes_best and sequence.request.sampling.adjusts_logits(sequence.num_output):
                adjusted = adjust(compact(logits[i : i + 1], sizes)[0], first_id, sequence, eos_ids)
                best = self._kernels.argmax(adjusted.reshape(1, 1, -1), (len(adjusted),))
                values[i], places[i] = best.values[0], best.places[0]
        pairs = np.empty(len(short), _PAIR)
        pairs["value"], pairs["token_id"] = _rows_of(values, short), first_id + _rows_of(places, short)
        gathered = np.empty((self._group.size, len(short)), _PAIR)
        counts = [2 * len(short)] * self._group.size
        self._group.gather(pairs.view(np.float32), gathered.view(np.float32), counts)
        if self._group.rank != 0:
            return []
        winners = gathered["value"].argmax(axis=0)  # the first of equals: the lowest id
        ids: list[int] = gathered["token_id"][winners, np.arange(len(short))].tolist()
        return ids

    def _whole_rows(self, logits: np.ndarray) -> np.ndarray:
        """Gather rows on the root as [R, G, U] over all grains."""
        num_rows, _, unit = logits.shape
        if self._group.size == 1:
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
        sizes = self._shards.sizes(range(len(self._shards.grain_ids)))
        scored = [i for i, row in enumerate(rows) if row.sequence.request.sampling.logprobs is not None]
        log_sums = iter(log_total(_rows_of(whole, scored), sizes, self._kernels).tolist() if scored else [])
        results = []
        for i, row in enumerate(rows):
            values = compact(whole[i : i + 1], sizes)[0]
            token_id = self._next_id(values, row, eos_ids)
            num_top = row.sequence.request.sampling.logprobs
            found = None if num_top is None else score(values, next(log_sums), token_id, num_top, self._kernels)
            results.append(RowResult(token_id, found))
        return results

    def _next_id(self, values: np.ndarray, row: LogitRow, eos_ids: tuple[int, ...]) -> int:
        """The token that is sampled from raw logits [V]; that of the prompt where it is scored."""
        request, sequence = row.sequence.request, row.sequence
        params = request.sampling
        if not row.samples:
            return request.prompt_ids[row.position + 1]
        if params.adjusts_logits(sequence.num_output):
            values = adjust(values, 0, sequence, eos_ids)
        seed = self._seed if params.seed is None else params.seed
        u = uniform(seed, request.row, sequence.choice, row.position + 1)
        return sample(values, params, u, self._kernels)


def _rows_of(array: np.ndarray, rows: list[int]) -> np.ndarray:
    """Some rows of an array; itself if they are all."""
    return array if len(rows) == len(array) else array[rows]


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
