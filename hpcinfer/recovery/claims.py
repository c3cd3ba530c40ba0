"""Claims: who works on which block. One claimant per MPI job; a claim is a file that can be linked only once."""

import json
import logging
import random
import re
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hpcinfer.recovery.durable import list_names, make_directory, publish_bytes
from hpcinfer.recovery.index import Index
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.leases import Lease, LeaseObserver
from hpcinfer.recovery.patience import patiently
from hpcinfer.recovery.sidecar import JournalReader
from hpcinfer.recovery.states import RowStates

log = logging.getLogger(__name__)

SHARD_BLOCKS = 256  # blocks whose claims share a directory
_CLAIM_NAME = re.compile(r"(\d+)\.g(\d+)")


class Claim(NamedTuple):
    """A block that this job has taken."""

    block: int
    generation: int  # 1, and one more for each take-over
    attempt: int
    rows: np.ndarray  # of the block, in order of work, without those that are finished (int64)


class Claimer:
    """Takes blocks for one MPI job. Not thread safe: use it from one thread at a time."""

    def __init__(self, paths: JobPaths, index: Index, lease: Lease, attempt: int = 0, *, poll_s: float = 2.0) -> None:
        """Learn what is finished and claimed.

        Args:
            lease: this job's own, started; its timeout is also what others are granted.
            poll_s: how often the journal, and claims and leases of others, are looked at.
        """
        self._paths, self._index, self._lease, self._attempt, self._poll_s = paths, index, lease, attempt, poll_s
        self._observer = LeaseObserver(paths.leases, lease.timeout_s)
        self._random = random.Random(lease.name)
        self._states, self._reader = RowStates(index.num_rows, attempt), JournalReader(paths)
        self._block_of_rows = index.block_of_rows()
        self._remaining = np.bincount(self._block_of_rows, minlength=index.num_blocks)  # unfinished rows per block
        self._generations = np.zeros(index.num_blocks, np.int64)  # highest known claim, 0: none
        self._owners: dict[tuple[int, int], str] = {}
        self._takeable: deque[int] = deque()
        self._num_living = 1
        self._next_poll = self._next_look = self._next_search = 0.0
        self.refresh()
        self._search()

    def claim(self) -> Claim | None:
        """Take the next block: one whose owner is gone, or one that nobody had. Not collective.

        Returns:
            None when nothing can be taken now; `is_complete` tells whether that is the end.
        """
        self.poll()
        claim = self._take_over() or self._claim_free()
        if claim is None and time.monotonic() >= self._next_search:
            self._search()
            claim = self._take_over()
        return claim

    def poll(self) -> None:
        """Read the journal if the last time was a while ago. Not collective."""
        if time.monotonic() >= self._next_poll:
            self.refresh()

    def refresh(self) -> None:
        """Read what was added to the journal. Not collective."""
        start = time.monotonic()
        for part_entries in self._reader.read():
            finished = self._states.update(part_entries)
            np.subtract.at(self._remaining, self._block_of_rows[finished], 1)
        now = time.monotonic()
        self._next_poll, self._next_look = now + self._poll_s, now + 9 * (now - start)

    def adopt(self, blocks: Iterable[int]) -> None:
        """Take over blocks that ranks of this job work on, from their claimant that has died. Not collective."""
        adopted = set(blocks)
        self._takeable = deque(block for block in self._takeable if block not in adopted)
        for block in sorted(adopted):
            self._link(block, int(self._generations[block]) + 1)
        self._next_search = 0.0  # what else that claimant had is about to be free

    def rest(self, rows: Mapping[int, np.ndarray]) -> list[Claim]:
        """Claims that this job has, for those of the rows, by block, that are not finished. Not collective."""
        self.refresh()
        left = {block: those[~self._states.are_finished(those)] for block, those in rows.items()}
        return [Claim(block, int(self._generations[block]), self._attempt, those)
                for block, those in left.items() if len(those)]  # fmt: skip

    def is_complete(self) -> bool:
        """Whether all rows are finished, whoever did it. Not collective.

        May be asked often: it reads the journal for at most a tenth of the time.
        """
        if time.monotonic() >= self._next_look:
            self.refresh()
        return not self._remaining.any()

    @property
    def num_done(self) -> int:
        """Rows that need no more work, as of the last refresh."""
        return self._index.num_rows - int(self._remaining.sum())

    @property
    def num_unclaimed(self) -> int:
        """Unfinished rows of blocks that nobody had, as far as we know."""
        return int(self._remaining[self._generations == 0].sum())

    def _claim_free(self) -> Claim | None:
        """Try free blocks in order of work; several claimants start at different ones, so that few collide."""
        while True:
            free = np.flatnonzero((self._remaining > 0) & (self._generations == 0))
            if not len(free):
                return None
            spread = 2 * self._num_living if self._num_living > 1 else 1
            block = int(free[self._random.randrange(min(spread, len(free)))])
            if self._link(block, 1):
                return Claim(block, 1, self._attempt, self._unfinished_rows(block))
            self._list_shard(self._shard(block))

    def _take_over(self) -> Claim | None:
        while self._takeable:
            block = self._takeable.popleft()
            generation = int(self._generations[block]) + 1
            if not self._link(block, generation):
                continue
            self.refresh()  # what the last owner has finished until its end
            rows = self._unfinished_rows(block)
            if len(rows):
                log.debug("block %d is taken over, generation %d, %d rows", block, generation, len(rows))
                return Claim(block, generation, self._attempt, rows)
        return None

    def _unfinished_rows(self, block: int) -> np.ndarray:
        rows = self._index.block_rows(block)
        return rows[~self._states.are_finished(rows)]

    def _search(self) -> None:
        """List all claims, and collect unfinished blocks whose owner is gone."""
        self.refresh()
        for shard in sorted(list_names(self._paths.claims)):
            self._list_shard(self._paths.claims / shard)
        self._num_living = sum(map(self._observer.is_alive, self._observer.names()))
        claimed = np.flatnonzero((self._remaining > 0) & (self._generations > 0))
        is_alive: dict[str, bool] = {}
        for block in map(int, claimed):
            owner = self._owner(block)
            if owner not in is_alive:
                is_alive[owner] = owner == self._lease.name or self._observer.is_alive(owner)
            if not is_alive[owner]:
                self._takeable.append(block)
        self._next_search = time.monotonic() + self._poll_s * self._random.uniform(0.5, 1.5)

    def _shard(self, block: int) -> Path:
        return self._paths.claims / f"{block // SHARD_BLOCKS:06d}"

    def _claim_path(self, block: int, generation: int) -> Path:
        return self._shard(block) / f"{block}.g{generation}"

    def _link(self, block: int, generation: int) -> bool:
        """Try to become the owner of a generation. Claims need not survive a crash of the file server."""
        path = self._claim_path(block, generation)
        make_directory(path.parent)
        record = {"lease": self._lease.name, "time": time.time()}
        is_ours = publish_bytes(path, json.dumps(record).encode(), sync=False)
        self._generations[block] = max(self._generations[block], generation)
        if is_ours:
            self._owners[block, generation] = self._lease.name
        return is_ours

    def _list_shard(self, shard: Path) -> None:
        for name in list_names(shard):
            if match := _CLAIM_NAME.fullmatch(name):
                block, generation = int(match[1]), int(match[2])
                if block < len(self._generations):
                    self._generations[block] = max(self._generations[block], generation)

    def _owner(self, block: int) -> str:
        """Name the lease of the highest known claim; empty, nobody, if it cannot be read."""
        key = block, int(self._generations[block])
        if key not in self._owners:
            try:
                path = self._claim_path(*key)
                self._owners[key] = json.loads(patiently(path.read_bytes, path))["lease"]
            except (OSError, ValueError, LookupError, TypeError):
                return ""
        return self._owners[key]
