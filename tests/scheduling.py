"""A scheduler with a make-believe model: runs requests to their end and checks every promise at every step.

The cache holds, for each slot, the ids of the prefix whose K and V would be there. A batch reads all slots of its
sequences: so a block that is shared wrongly, written twice or handed out too early is seen at once.
"""

import hashlib
import random
from collections import Counter, deque
from dataclasses import dataclass, field

from hpcinfer.config import SamplingParams
from hpcinfer.engine.block_manager import BlockManager
from hpcinfer.engine.request import Request
from hpcinfer.engine.scheduler import Limits, Scheduler, Work
from hpcinfer.engine.sequence import Finish, Sequence
from hpcinfer.report.metrics import Metrics


@dataclass(frozen=True)
class Setting:
    """What a simulation runs on."""

    limits: Limits
    num_blocks: int
    block_size: int

    @property
    def max_len(self) -> int:
        """Tokens that one sequence may have."""
        return self.num_blocks * self.block_size


@dataclass
class Simulation:
    """One run. `arrivals` gives the requests that come before each step."""

    setting: Setting
    arrivals: list[list[Request]]
    metrics: Metrics = field(default_factory=Metrics)
    finished: dict[tuple[int, int], Sequence] = field(default_factory=dict)  # by row and choice
    scored: Counter[tuple[int, int, int]] = field(default_factory=Counter)  # row, choice, position
    sampled: Counter[tuple[int, int, int]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.blocks = BlockManager(self.setting.num_blocks, self.setting.block_size)
        self.scheduler = Scheduler(self.setting.limits, self.blocks, self.metrics)
        self.in_flight: deque[list[Work]] = deque([[] for _ in range(self.setting.limits.num_micro_batches)])
        self._sampled: dict[int, list[int]] = {}  # by seq_id: tokens that are not committed yet
        self._cache: dict[int, tuple[int, ...]] = {}  # slot -> prefix up to and including its token
        self._digest = hashlib.sha256()

    def run(self) -> str:
        """Run to the end; returns a digest of all decisions."""
        arrivals = deque(self.arrivals)
        while arrivals or self.scheduler.num_live:
            for work in self.in_flight.popleft():
                self._commit(work)
            for request in arrivals.popleft() if arrivals else ():
                self.scheduler.add(request)
            works = self.scheduler.schedule()
            self.in_flight.append(works)
            for work in works:
                self._compute(work)
            self._check(works)
            batch = repr([(work.sequence.seq_id, work.start, work.stop) for work in works])
            self._digest.update(self.scheduler.digest() + batch.encode())
        assert self.blocks.num_free == self.setting.num_blocks
        return self._digest.hexdigest()

    def _compute(self, work: Work) -> None:
        sequence, size = work.sequence, self.setting.block_size
        coming = self._sampled.setdefault(sequence.seq_id, [])
        token_ids = sequence.token_ids + coming
        assert sequence.num_computed <= work.start < work.stop <= len(token_ids)
        assert self.setting.limits.goes_ahead or (work.start == sequence.num_computed and not coming)
        slots = [sequence.blocks[p // size] * size + p % size for p in range(work.stop)]
        prefixes = [tuple(token_ids[: p + 1]) for p in range(work.stop)]
        for position in range(work.start, work.stop):
            self._cache[slots[position]] = prefixes[position]
        assert [self._cache.get(slot) for slot in slots] == prefixes, sequence
        self.scored.update((sequence.request.row, sequence.choice, position) for position in work.scored)
        if work.samples:
            assert work.stop == len(token_ids)
            coming.append(next_token(token_ids, sequence.choice))

    def _commit(self, work: Work) -> None:
        sequence = work.sequence
        if sequence.is_finished:
            state = sequence.token_ids.copy(), self.blocks.num_free
            self.scheduler.commit(work, None, Finish.NONE)
            assert (sequence.token_ids, self.blocks.num_free) == state and not sequence.blocks
            return
        token_id = self._sampled[sequence.seq_id].pop(0) if work.samples else None
        if work.samples:
            self.sampled[sequence.request.row, sequence.choice, work.stop - 1] += 1
        is_last = work.stop >= sequence.num_prompt and sequence.num_output + work.samples >= output_length(sequence)
        self.scheduler.commit(work, token_id, Finish.LENGTH if is_last else Finish.NONE)
        if is_last:
            assert not sequence.blocks and sequence not in self.scheduler.running
            self.finished[sequence.request.row, sequence.choice] = sequence

    def _check(self, works: list[Work]) -> None:
        limits, scheduler = self.setting.limits, self.scheduler
        assert len(works) <= limits.max_num_seqs
        assert sum(work.stop - work.start for work in works) <= limits.max_num_batched_tokens
        computing = [work.sequence.seq_id for batch in self.in_flight for work in batch]
        most = 2 if limits.goes_ahead else 1
        assert max(Counter(computing).values(), default=0) <= most, "a sequence is in too many batches"
        assert len({work.sequence.seq_id for work in works}) == len(works)
        assert computing or not scheduler.num_live, "nothing runs and something waits"
        running = {s.seq_id for s in scheduler.running}
        assert [s.seq_id for s in scheduler.running if s.is_in_flight] == sorted(running & set(computing))
        self.blocks.check_integrity()
        held = {block for sequence in scheduler.running for block in sequence.blocks}
        assert self.blocks.num_free == self.setting.num_blocks - len(held)
        assert all(not sequence.blocks for sequence in scheduler.waiting)


def output_length(sequence: Sequence) -> int:
    """When a make-believe sequence ends: a function of its row and choice."""
    limit = sequence.request.sampling.max_tokens
    return min(limit, 1 + (7 * sequence.request.row + 3 * sequence.choice) % max(1, limit))


def next_token(token_ids: list[int], choice: int) -> int:
    """What a make-believe model says: a function of the tokens, with few values, so that prefixes meet."""
    return (sum(token_ids) + len(token_ids) + choice) % 3


def random_requests(rng: random.Random, setting: Setting, count: int) -> list[Request]:
    """Requests that fit: prompts of few ids with common beginnings, several choices, scoring."""
    stem = [rng.randrange(3) for _ in range(setting.max_len)]
    requests = []
    for row in range(count):
        length = rng.randint(1, max(1, min(setting.max_len - 1, 40)))
        shared = rng.randint(0, length)
        prompt = stem[:shared] + [rng.randrange(3) for _ in range(length - shared)]
        scores = rng.random() < 0.3
        max_tokens = rng.randint(0 if scores else 1, max(1, min(setting.max_len - length, 20)))
        logprobs, n = 1 if scores else None, rng.choice((1, 1, 1, 3))
        penalty = rng.choice((0.0, 0.0, 0.0, 0.5))
        params = SamplingParams(max_tokens=max_tokens, n=n, echo=scores, logprobs=logprobs, presence_penalty=penalty)
        requests.append(Request(row, tuple(prompt), params))
    return requests


def random_simulation(seed: int, setting: Setting, count: int) -> Simulation:
    """Requests that arrive in bursts."""
    rng = random.Random(seed)
    requests, arrivals = random_requests(rng, setting, count), []
    while requests:
        burst = rng.choice((0, 0, 1, 2, len(requests)))
        arrivals.append(requests[:burst])
        del requests[:burst]
    return Simulation(setting, arrivals)


def busy_simulation() -> Simulation:
    """Many sequences on little memory: preemptions, chunks, mixed batches and reused prefixes all happen."""
    return random_simulation(5, Setting(Limits(4, 16, 2), num_blocks=24, block_size=4), 40)
