"""Claims of a job whose time is limited: no block is taken that would not be finished before the end."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np

from hpcinfer.recovery.claims import Claim, Claimer
from hpcinfer.recovery.index import Index
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.leases import Lease
from hpcinfer.recovery.stopping import TIME_LIMIT, Stopper

log = logging.getLogger(__name__)


class PunctualClaimer(Claimer):
    """A claimer that looks at the clock first."""

    def __init__(self, paths: JobPaths, index: Index, lease: Lease, attempt: int, stopper: Stopper) -> None:
        """Learn what is finished and claimed, as every claimer does."""
        super().__init__(paths, index, lease, attempt)
        self._stopper = stopper
        self._blocks = np.zeros(0, np.int64)  # claimed, with rows that are not finished
        self._num_held = 0  # rows of all blocks that were claimed
        self._block_rows = 0  # of the last block; the next will be about as large
        self._is_late = False

    def claim(self) -> Claim | None:
        """Take the next block if there is time for it. Not collective.

        When there is none, and all that was taken is finished, the job is stopped: nobody waits for the end.
        """
        num_open = self._look()
        if not self._stopper.has_time_for(num_open + self._block_rows):
            self._end(num_open)
            return None
        claim = super().claim()
        if claim is not None:
            self._hold([claim.block])
            self._block_rows = len(claim.rows)
        return claim

    def adopt(self, blocks: Iterable[int]) -> None:
        """Take over blocks that ranks of this job work on, from their claimant that has died. Not collective."""
        adopted = sorted(set(blocks))
        super().adopt(adopted)
        self._hold(adopted)

    def _hold(self, blocks: list[int]) -> None:
        self._blocks = np.append(self._blocks, np.array(blocks, np.int64))
        self._num_held += int(self._remaining[np.array(blocks, np.int64)].sum())

    def _look(self) -> int:
        """Count the rows that are claimed and not finished, and measure the speed."""
        self._blocks = self._blocks[self._remaining[self._blocks] > 0]
        num_open = int(self._remaining[self._blocks].sum())
        self._stopper.pace.observe(self._num_held - num_open)
        return num_open

    def _end(self, num_open: int) -> None:
        if not self._is_late and self._stopper.reason() is None:
            log.info("no more work is taken: it would not be finished before the end of the time")
        self._is_late = True
        if num_open == 0 and not self.is_complete():
            self._stopper.stop(TIME_LIMIT)
