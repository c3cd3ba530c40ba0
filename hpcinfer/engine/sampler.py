"""The sampler: one rank of the last stage samples, the others are told.

Logits live in vocabulary grains spread over tp. Rows that are greedy and need no log-probabilities travel as one
(value, id) pair per rank; the others as whole rows. Either way the root sees the same numbers for every tp. Logits stay
where the kernels have them; what comes of them is fetched, and may be waited for later.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from hpcinfer.comm.operations import Operations
from hpcinfer.comm.protocol import Buffer
from hpcinfer.engine.batch import LogitRow
from hpcinfer.engine.logits import TokenScore, changes_for, uniform
from hpcinfer.kernels.protocol import Array, Changes, Draw, Fetch, Kernels
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

    def ids(self, run: range) -> range:
        """Ids in a run of grains."""
        return range(self.grain_ids[run.start].start, self.grain_ids[run.stop - 1].stop)

    def sizes(self, run: range) -> tuple[int, ...]:
        """True ids in each grain of a run."""
        return tuple(len(self.grain_ids[g]) for g in run)


class Gathers(Protocol):
    """What brings arrays of the kernels to one rank: `Operations`, or a group of devices."""

    def gather(self, send: Buffer, receive: Buffer | None, counts: list[int]) -> None:
        """Concatenate float32 buffers of `counts[rank]` elements into `receive`, by rank, on rank 0."""


class Sampler:
    """Turns the logits of a batch into tokens. Collective over tp of the last stage.

    Args:
        kernels: whose logits they are.
        group: tp of the last stage.
        vocab_size: ids.
        grains: of the vocabulary.
        seed: of all requests that have none.
        arrays: the same ranks, where arrays are in the memory of devices.
        keeps_ids: whether the next batch may compute tokens that are sampled, before they are fetched; of one rank.
    """

    def __init__(
        self, kernels: Kernels, group: Operations, vocab_size: int, grains: int, seed: int,
        arrays: Gathers | None = None, *, keeps_ids: bool = False,
    ) -> None:  # fmt: skip
        self._keeps_ids = keeps_ids
        self._kernels, self._group, self._seed, self._arrays = kernels, group, seed, arrays or group
        self._shards = VocabShards(grain_ranges(vocab_size, grains), grain_runs(grains, group.size))
        self._run = self._shards.runs[group.rank]
        self._first_id = self._shards.ids(self._run).start

    def start(self, logits: Array, rows: list[LogitRow], eos_ids: tuple[int, ...]) -> "Sampling":
        """Begin to sample or score every row.

        Collective over tp of the last stage.

        Args:
            logits: float32 [R, G, U] of this rank's grains.
            rows: what is wanted of each, R of them.
            eos_ids: end-of-sequence ids, kept away until min_tokens.
        """
        short = [i for i, row in enumerate(rows) if row.sequence.takes_best or _is_short(row)]
        best = self._best(logits, rows, short, eos_ids) if short else []
        is_short = set(short)
        long = [i for i in range(len(rows)) if i not in is_short] if len(short) < len(rows) else []
        drawn = self._drawn(self._take(logits, long), [rows[i] for i in long], eos_ids) if long else []
        if self._keeps_ids:
            for ids, kept in ((best[1:], short), (drawn[:1], long)):
                if kept:
                    self._kernels.keep_ids(ids[0], kept)
        fetch = self._kernels.fetch([*best, *drawn])
        return Sampling(rows, short, long, fetch, self._group, self._first_id)

    def _best(self, logits: Array, rows: list[LogitRow], short: list[int], eos_ids: tuple[int, ...]) -> list[Array]:
        """Values and places of the largest logits of short rows."""
        ids, changes = self._shards.ids(self._run), dict[int, Changes]()
        for i in short:
            sequence = rows[i].sequence
            if not sequence.takes_best and sequence.request.sampling.adjusts_logits(rows[i].num_output):
                changes[i] = changes_for(sequence, rows[i].num_output, eos_ids, ids)
        best = self._kernels.argmax(logits, self._shards.sizes(self._run), changes)
        return [self._take(each, short) for each in best]

    def _drawn(self, logits: Array, rows: list[LogitRow], eos_ids: tuple[int, ...]) -> list[Array]:
        """Ids of long rows, and what the scores of those are made of that have one; nothing but on the root."""
        whole = self._whole_rows(logits)
        if whole is None:
            return []
        every = range(len(self._shards.grain_ids))
        sizes, ids = self._shards.sizes(every), self._shards.ids(every)
        drawn = self._kernels.draw(whole, sizes, [self._draw(row, eos_ids, ids) for row in rows])
        scored = _scored(rows)
        if not scored:
            return [drawn]
        num_top = max(_num_top(rows[i]) for i in scored)
        scores = self._kernels.score(self._take(whole, scored), sizes, self._take(drawn, scored), num_top)
        return [drawn, *scores]

    def _draw(self, row: LogitRow, eos_ids: tuple[int, ...], ids: range) -> Draw:
        """How the token of a row is chosen; that of the prompt where it is scored."""
        request, sequence = row.sequence.request, row.sequence
        params = request.sampling
        if not row.samples:
            return Draw(0.0, known_id=request.prompt_ids[row.position + 1])
        num_output = row.num_output
        changes = changes_for(sequence, num_output, eos_ids, ids) if params.adjusts_logits(num_output) else None
        seed = self._seed if params.seed is None else params.seed
        u = uniform(seed, request.row, sequence.choice, row.position + 1)
        return Draw(params.temperature, params.top_k, params.top_p, params.min_p, u, changes=changes)

    def _whole_rows(self, logits: Array) -> Array | None:
        """Gather rows on the root as [R, G, U] over all grains; nothing elsewhere."""
        num_rows, _, unit = logits.shape
        if self._group.size == 1:
            return logits
        counts = [num_rows * len(run) * unit for run in self._shards.runs]
        if self._group.rank != 0:
            self._arrays.gather(logits.reshape(-1), None, counts)
            return None
        buffer = self._kernels.empty((sum(counts),))
        self._arrays.gather(logits.reshape(-1), buffer, counts)
        parts, start = [], 0
        for count, run in zip(counts, self._shards.runs, strict=True):
            parts.append(buffer[start : start + count].reshape(num_rows, len(run), unit))
            start += count
        return self._kernels.join_grains(parts)

    def _take(self, array: Array, rows: list[int]) -> Array:
        """Some rows of an array; itself if they are all."""
        return array if len(rows) == len(array) else self._kernels.take(array, rows)


@dataclass(frozen=True)
class Sampling:
    """What is sampled from a batch, on its way to the host."""

    rows: list[LogitRow]
    short: list[int]  # rows of which each rank has the best of its ids
    long: list[int]  # rows that the root has drawn
    fetch: Fetch  # values and places of short rows, then ids of long ones, then scores
    group: Operations
    first_id: int  # of this rank

    @property
    def is_late(self) -> bool:
        """Whether it may still be under way; the same on all ranks."""
        return self.fetch.is_late

    def finish(self) -> list[RowResult]:
        """Wait for it.

        Collective over tp of the last stage.

        Returns:
            A result for each row on the root (tp rank 0), nothing elsewhere.
        """
        arrays = self.fetch.wait()
        ids = self._winners(arrays[0], arrays[1]) if self.short else []
        if self.group.rank != 0:
            return []
        if not self.long:
            return [RowResult(token_id, None) for token_id in ids]
        results = dict(zip(self.short, (RowResult(token_id, None) for token_id in ids), strict=True))
        results |= zip(self.long, self._long_results(*arrays[2 if self.short else 0 :]), strict=True)
        return [results[i] for i in range(len(self.rows))]

    def _winners(self, values: np.ndarray, places: np.ndarray) -> list[int]:
        """Ids of the largest logits of short rows; none but on the root."""
        if self.group.size == 1:
            found: list[int] = places.tolist()
            return found
        pairs = np.empty(len(self.short), _PAIR)
        pairs["value"], pairs["token_id"] = values, self.first_id + places
        gathered = np.empty((self.group.size, len(self.short)), _PAIR)
        self.group.gather(pairs.view(np.float32), gathered.view(np.float32), [2 * len(self.short)] * self.group.size)
        if self.group.rank != 0:
            return []
        winners = gathered["value"].argmax(axis=0)  # the first of equals: the lowest id
        ids: list[int] = gathered["token_id"][winners, np.arange(len(self.short))].tolist()
        return ids

    def _long_results(self, ids: np.ndarray, *scores: np.ndarray) -> Iterator[RowResult]:
        rows = [self.rows[i] for i in self.long]
        scored = dict(zip(_scored(rows), zip(*(each.tolist() for each in scores), strict=True), strict=True))
        for i, (row, token_id) in enumerate(zip(rows, ids.tolist(), strict=True)):
            found = None
            if i in scored:
                log_sum, value, top_ids, top_values = scored[i]
                top = zip(top_ids[: _num_top(row)], (each - log_sum for each in top_values), strict=False)
                found = TokenScore(token_id, value - log_sum, tuple(top))
            yield RowResult(token_id, found)


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


def _scored(rows: list[LogitRow]) -> list[int]:
    """Rows whose log-probabilities are asked for."""
    return [i for i, row in enumerate(rows) if row.sequence.request.sampling.logprobs is not None]


def _num_top(row: LogitRow) -> int:
    """Most likely tokens that are asked for with a row."""
    return row.sequence.request.sampling.logprobs or 0
