"""The scheduler: which tokens of which sequences make the next batch. Integers only, replicated on every rank.

Decides from replicated data and ordered containers alone: no clock, no set, no hash order. Sequences of
micro-batches in flight are left alone until their step record is committed, unless a device keeps the ids that it
samples: then the next token of a sequence may be computed before anybody knows which one it is. What several sequences
begin with is computed once: one of them computes it, the others wait and are passed by those behind them.
"""

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from operator import attrgetter
from typing import NamedTuple

from hpcinfer.engine.block_manager import BlockManager
from hpcinfer.engine.request import Request
from hpcinfer.engine.sequence import Finish, Sequence
from hpcinfer.report.metrics import Metrics

_BY_ID = attrgetter("seq_id")


class Work(NamedTuple):
    """Tokens [start, stop) of a sequence, to be computed in one batch."""

    sequence: Sequence
    start: int
    stop: int
    samples: bool  # whether the next token is to be sampled after the last one

    @staticmethod
    def of(sequence: Sequence, start: int, stop: int) -> "Work":
        """Tokens of a sequence, whose last one may be under way when this begins."""
        return Work(sequence, start, stop, stop >= len(sequence.token_ids) and sequence.request.sampling.max_tokens > 0)

    @property
    def scored(self) -> range:
        """Positions whose logits give the log-probability of the next prompt token."""
        sequence = self.sequence
        return range(max(self.start, sequence.num_scored - 1), min(self.stop, sequence.num_prompt - 1))

    @property
    def num_rows(self) -> int:
        """Rows of logits that are wanted of it."""
        sequence = self.sequence
        return self.samples + (len(self.scored) if sequence.num_scored < sequence.num_prompt else 0)


@dataclass(frozen=True)
class Limits:
    """What bounds a batch."""

    max_num_seqs: int  # sequences of one batch
    max_num_batched_tokens: int  # tokens of one batch
    num_micro_batches: int = 1  # batches in flight
    num_shares: int = 0  # batches that few sequences are shared out to, so that each stage has one; 0 is all in flight
    goes_ahead: bool = False  # whether sequences of the last batch may be in the next one, which needs two in flight

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
    num_tokens: int = 0
    num_decodes: int = 0  # works behind their prompt
    num_chunks: int = 0  # works that end inside their prompt
    lacks_blocks: bool = False  # a sequence waits for those of others that are in flight: these must not go ahead

    @property
    def room(self) -> int:
        """Tokens that one more sequence may have."""
        return self.tokens_left if self.sequences_left > 0 else 0

    def add(self, sequence: Sequence, stop: int) -> None:
        """Take in what is neither computed nor in flight of a sequence's first `stop` tokens; it is in flight now."""
        work = Work.of(sequence, sequence.num_scheduled, stop)
        sequence.num_scheduled = stop
        self.works.append(work)
        self.tokens_left -= stop - work.start
        self.num_tokens += stop - work.start
        self.sequences_left -= 1
        self.num_decodes += work.start >= sequence.num_prompt
        self.num_chunks += stop < sequence.num_prompt


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

    def schedule(self, num_tokens: int | None = None) -> list[Work]:
        """Choose the next batch and mark its sequences as in flight; empty when nothing can run.

        Args:
            num_tokens: of the batch, at most; the limit if it is lower, or if this is None.
        """
        limit = self.limits.max_num_batched_tokens
        draft = _Draft(limit if num_tokens is None else min(limit, num_tokens), self._batch_sequences())
        preemptions = self._metrics.counts["preemptions"]
        for sequence in list(self.running):
            if draft.room == 0:
                break
            if sequence.num_scheduled > sequence.num_computed:  # in flight
                if self.limits.goes_ahead and not draft.lacks_blocks and _may_go_ahead(sequence):
                    self._schedule_ahead(sequence, draft)
            elif sequence.blocks:  # without: preempted a moment ago, by one before it
                self._schedule_running(sequence, draft)
        if self._metrics.counts["preemptions"] == preemptions:
            self._admit_waiting(draft)
        self._observe(draft)
        return draft.works

    def commit(self, work: Work, token_id: int | None, finish: Finish) -> None:
        """Take over the result of one work: tokens computed, perhaps a token sampled, perhaps the end."""
        sequence = work.sequence
        if sequence.is_finished:  # by the work before, which was not known when this one began
            self._metrics.count("wasted_tokens", work.stop - work.start)
            return
        sequence.num_computed = work.stop
        sequence.num_scored = max(sequence.num_scored, min(work.stop + 1, sequence.num_prompt))
        self.blocks.remember(sequence)
        if token_id is not None:
            sequence.token_ids.append(token_id)
        if finish is not Finish.NONE:
            sequence.is_finished = True
            self.blocks.release(sequence)
            self._stop_running(sequence)

    def unfinished(self) -> list[Request]:
        """Requests that are not finished, in order of admission, with the output tokens that they have so far.

        One whose log-probabilities are asked for, or one choice of which has ended, begins anew: the tokens do not
        tell all of it."""
        rows: dict[int, list[Sequence]] = {}
        for sequence in sorted((*self.running, *self.waiting), key=_BY_ID):
            rows.setdefault(sequence.request.row, []).append(sequence)
        return [_resumable(sequences) for sequences in rows.values()]

    def digest(self) -> bytes:
        """Fingerprint of all decisions so far, equal on every rank of a replica."""
        state = blake2b(digest_size=8)
        for sequence in (*self.running, *self.waiting):
            numbers = (sequence.seq_id, len(sequence.token_ids), sequence.num_computed, *sequence.blocks)
            state.update(repr(numbers).encode())
        return state.digest()

    def _schedule_running(self, sequence: Sequence, draft: _Draft) -> None:
        stop = min(len(sequence.token_ids), sequence.num_computed + draft.room)
        if self.blocks.grow(sequence, stop) or self._make_room(sequence, stop):
            self._take(sequence, stop, draft)
        else:
            draft.lacks_blocks = True

    def _schedule_ahead(self, sequence: Sequence, draft: _Draft) -> None:
        """Take in the token that is being sampled; nobody is preempted for it."""
        stop = sequence.num_scheduled + 1
        if self.blocks.grow(sequence, stop):
            self._take(sequence, stop, draft)
        else:
            draft.lacks_blocks = True

    def _take(self, sequence: Sequence, stop: int, draft: _Draft) -> None:
        """Take in a sequence that has blocks for its first `stop` tokens."""
        self.blocks.announce(sequence)
        draft.add(sequence, stop)

    def _admit_waiting(self, draft: _Draft) -> None:
        """Admit in order. One whose prefix a running sequence computes waits for it, and is asked first the next time;
        nobody passes one that lacks room."""
        passed: list[Sequence] = []
        while self.waiting and draft.room > 0 and len(self.running) < self.limits.max_running:
            sequence = self.waiting[0]
            if _shares(sequence) and self.blocks.is_coming(sequence):
                passed.append(self.waiting.popleft())
            elif self._admit(sequence, draft):
                insort(self.running, self.waiting.popleft(), key=_BY_ID)
            else:
                break
        self._metrics.count("prefix_waits", len(passed))
        self.waiting.extendleft(reversed(passed))

    def _admit(self, sequence: Sequence, draft: _Draft) -> bool:
        if _shares(sequence):
            self.blocks.reuse_prefix(sequence)
        stop = min(len(sequence.token_ids), sequence.num_computed + draft.room)
        if not self.blocks.grow(sequence, stop):
            self.blocks.release(sequence)
            return False
        self._metrics.count("reused_tokens", sequence.num_computed)
        self._take(sequence, stop, draft)
        return True

    def _batch_sequences(self) -> int:
        """Sequences of the next batch at most: an even share of all, so that every stage has work."""
        limits = self.limits
        share = -(-min(self.num_live, limits.max_running) // (limits.num_shares or limits.num_micro_batches))
        return min(share, limits.max_num_seqs)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give it blocks by preempting the latest sequences, itself at last; false if it cannot run in this batch."""
        while not self.blocks.grow(sequence, num_tokens):
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
        self._stop_running(sequence)
        self.waiting.appendleft(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        del self.running[bisect_left(self.running, sequence.seq_id, key=_BY_ID)]

    def _observe(self, draft: _Draft) -> None:
        if draft.works:
            self._metrics.count("steps")
            self._metrics.count("tokens", draft.num_tokens)
            self._metrics.count("mixed_batches", int(0 < draft.num_decodes < len(draft.works)))
            self._metrics.count("chunks", draft.num_chunks)
            self._metrics.peak("batch_sequences", len(draft.works))
            self._metrics.peak("batch_tokens", draft.num_tokens)


def _resumable(sequences: list[Sequence]) -> Request:
    """The request of these choices, to be continued where they are if their tokens tell all of it."""
    request = sequences[0].request
    is_told = len(sequences) == request.sampling.n and request.sampling.logprobs is None
    return replace(request, resumed=tuple(tuple(each.output_ids) for each in sequences) if is_told else ())


def _may_go_ahead(sequence: Sequence) -> bool:
    """Whether the token that is sampled behind a sequence in flight is not its last one by length, and need not be
    known for the one behind it to be chosen. It may turn out to end the sequence."""
    params, num_scheduled = sequence.request.sampling, sequence.num_scheduled
    return (
        num_scheduled == len(sequence.token_ids)
        and num_scheduled + 1 - sequence.num_prompt < params.max_tokens
        and not params.needs_seen_ids
    )


def _shares(sequence: Sequence) -> bool:
    """Whether a sequence may take blocks of others: while its prompt is scored it needs all its hidden states."""
    return sequence.num_scored == sequence.num_prompt
