"""The scheduler: which tokens of which sequences make the next batch. Integers only, replicated on every rank.

Decides from replicated data and ordered containers alone: no clock, no set, no hash order. Sequences of
micro-batches in flight are left alone until their step record is committed.
"""

from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from hashlib import blake2b
from operator import attrgetter
from typing import NamedTuple

from hpcinfer.engine.block_manager import BlockManager
from hpcinfer.engine.request import Request
from hpcinfer.engine.sequence import Finish, Sequence
from hpcinfer.report.metrics import Metrics


class Work(NamedTuple):
    """Tokens [start, stop) of a sequence, to be computed in one batch."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        """Whether the next token is to be sampled after the last one."""
        sequence = self.sequence
        return self.stop == len(sequence.token_ids) and sequence.request.sampling.max_tokens > 0

    @property
    def scored(self) -> range:
        """Positions whose logits give the log-probability of the next prompt token."""
        sequence = self.sequence
        return range(max(self.start, sequence.num_scored - 1), min(self.stop, sequence.num_prompt - 1))


@dataclass(frozen=True)
class Limits:
    """What bounds a batch."""

    max_num_seqs: int  # sequences of one batch
    max_num_batched_tokens: int  # tokens of one batch
    num_micro_batches: int = 1  # batches in flight

    @property
    def max_running(self) -> int:
        """Sequences of all batches in flight."""
        return self.max_num_seqs * self.num_micro_batches


@dataclass
class _Draft:
    """A batch in the making."""

    tokens_left: int
    sequences_left: int
    works: list[Work] = field(default_factory=list)

    @property
    def room(self) -> int:
        """Tokens that one more sequence may have."""
        return self.tokens_left if self.sequences_left > 0 else 0

    def add(self, work: Work) -> None:
        """Take a work in."""
        self.works.append(work)
        self.tokens_left -= work.stop - work.start
        self.sequences_left -= 1


class Scheduler:
    """Continuous batching with chunked prefill and preemption by recomputation."""

    def __init__(self, limits: Limits, blocks: BlockManager, metrics: Metrics) -> None:
        self.limits, self.blocks, self._metrics = limits, blocks, metrics
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self._num_admitted = 0

    @property
    def num_live(self) -> int:
        """Sequences that are not finished."""
        return len(self.waiting) + len(self.running)

    def add(self, request: Request) -> list[Sequence]:
        """Queue a request; returns its sequences, one per choice."""
        sequences = [Sequence(self._num_admitted + i, request, i) for i in range(request.sampling.n)]
        self._num_admitted += len(sequences)
        self.waiting.extend(sequences)
        return sequences

    def schedule(self) -> list[Work]:
        """Choose the next batch and mark its sequences as in flight; empty when nothing can run."""
        draft = _Draft(self.limits.max_num_batched_tokens, self._batch_sequences())
        preemptions = self._metrics.counts["preemptions"]
        for sequence in list(self.running):
            self._schedule_running(sequence, draft)
        if self._metrics.counts["preemptions"] == preemptions:
            while self.waiting and self._admit(self.waiting[0], draft):
                insort(self.running, self.waiting.popleft(), key=attrgetter("seq_id"))
        for work in draft.works:
            work.sequence.is_in_flight = True
        self._observe(draft.works)
        return draft.works

    def commit(self, work: Work, token_id: int | None, finish: Finish) -> None:
        """Take over the result of one work: tokens computed, perhaps a token sampled, perhaps the end."""
        sequence = work.sequence
        sequence.is_in_flight = False
        sequence.num_computed = work.stop
        sequence.num_scored = max(sequence.num_scored, min(work.stop + 1, sequence.num_prompt))
        self.blocks.remember(sequence)
        if token_id is not None:
            sequence.token_ids.append(token_id)
        if finish is not Finish.NONE:
            self.blocks.release(sequence)
            self.running.remove(sequence)

    def digest(self) -> bytes:
        """Fingerprint of all decisions so far, equal on every rank of a replica."""
        state = blake2b(digest_size=8)
        for sequence in (*self.running, *self.waiting):
            numbers = (sequence.seq_id, len(sequence.token_ids), sequence.num_computed, *sequence.blocks)
            state.update(repr(numbers).encode())
        return state.digest()

    def _schedule_running(self, sequence: Sequence, draft: _Draft) -> None:
        if sequence.is_in_flight or draft.room == 0 or not sequence.blocks:
            return  # without blocks: preempted a moment ago, by one before it
        stop = min(len(sequence.token_ids), sequence.num_computed + draft.room)
        if self._make_room(sequence, stop):
            self.blocks.grow(sequence, stop)
            draft.add(Work(sequence, sequence.num_computed, stop))

    def _admit(self, sequence: Sequence, draft: _Draft) -> bool:
        if draft.room == 0 or len(self.running) >= self.limits.max_running:
            return False
        if sequence.num_scored == sequence.num_prompt:
            self.blocks.reuse_prefix(sequence)
        stop = min(len(sequence.token_ids), sequence.num_computed + draft.room)
        if not self.blocks.can_grow(sequence, stop):
            self.blocks.release(sequence)
            return False
        self._metrics.count("reused_tokens", sequence.num_computed)
        self.blocks.grow(sequence, stop)
        draft.add(Work(sequence, sequence.num_computed, stop))
        return True

    def _batch_sequences(self) -> int:
        """Sequences of the next batch at most: an even share of all, so that every micro-batch has work."""
        return -(-min(self.num_live, self.limits.max_running) // self.limits.num_micro_batches)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Free blocks by preempting the latest sequences, itself at last; false if it cannot run in this batch."""
        while not self.blocks.can_grow(sequence, num_tokens):
            victim = self.running[-1]
            if victim.is_in_flight:
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._metrics.count("preemptions")
        self.blocks.release(sequence)
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)

    def _observe(self, works: list[Work]) -> None:
        if works:
            decodes = sum(work.start >= work.sequence.num_prompt for work in works)
            self._metrics.count("steps")
            self._metrics.count("mixed_batches", int(0 < decodes < len(works)))
            self._metrics.count("chunks", sum(w.stop < w.sequence.num_prompt for w in works))
            self._metrics.peak("batch_sequences", len(works))
            self._metrics.peak("batch_tokens", sum(work.stop - work.start for work in works))
