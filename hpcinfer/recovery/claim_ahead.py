"""Blocks claimed in a thread, some for each replica in advance. On the claimant only."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from math import inf
from queue import Empty, SimpleQueue

import numpy as np

from hpcinfer.recovery.claims import Claim, Claimer

_POLL_S = 0.2  # between two looks at the job directory when nothing can be claimed
_BLOCKS_AHEAD = 4  # claimed in advance, per replica


class ClaimAhead:
    """Claims blocks in a thread, some for each replica in advance."""

    def __init__(self, claimer: Claimer, num_replicas: int) -> None:
        self._claimer = claimer
        self._claims: SimpleQueue[Claim] = SimpleQueue()
        self._num_ahead: float = _BLOCKS_AHEAD * num_replicas
        self._room = threading.Event()  # there may be room for one more
        self._returned: SimpleQueue[Mapping[int, np.ndarray]] = SimpleQueue()
        self._num_unclaimed = claimer.num_unclaimed
        self._num_claimed = self._num_taken = 0  # rows; each is written by one thread
        self._stop, self._wake = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self.is_complete = False
        self.num_done = claimer.num_done  # rows of the whole job known to be finished
        self._thread = threading.Thread(target=self._run, name="claims", daemon=True)
        self._thread.start()

    def take(self) -> Claim | None:
        """Next claim, or None if there is none now. Not collective."""
        if self._error is not None:
            raise self._error
        try:
            claim = self._claims.get_nowait()
        except Empty:
            return None
        self._room.set()
        self._num_taken += len(claim.rows)
        return claim

    def claim_all(self) -> None:
        """Claim all there is, however few are taken: the job is dealt at once. Not collective."""
        self._num_ahead = inf
        self._room.set()

    @property
    def num_undealt(self) -> int:
        """Unfinished rows that nobody works on, as far as we know."""
        return self._num_unclaimed + self._num_claimed - self._num_taken

    def give_back(self, rows: Mapping[int, np.ndarray]) -> None:
        """Let rows of this job's blocks, by block, be taken again, if they are not finished. Not collective."""
        self._returned.put(rows)
        self._wake.set()

    def look(self) -> None:
        """Look at the job directory now, since somebody has nothing to do. Not collective."""
        self._wake.set()

    def close(self) -> None:
        """Stop the thread. Not collective."""
        self._stop.set()
        self._wake.set()
        self._room.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set() and not self.is_complete:
                self._take_back()
                self._claim()
        except BaseException as error:  # raised again where the claims are taken
            self._error = error

    def _claim(self) -> None:
        claim = self._claimer.claim()
        self._num_claimed += 0 if claim is None else len(claim.rows)  # before the next line: never too few
        is_complete = claim is None and self._claimer.is_complete()
        self.num_done, self._num_unclaimed = self._claimer.num_done, self._claimer.num_unclaimed
        self.is_complete = is_complete
        if claim is not None:
            self._put(claim)
        elif self._returned.empty():
            self._wake.wait(_POLL_S)
            self._wake.clear()

    def _take_back(self) -> None:
        while not self._returned.empty():
            for claim in self._claimer.rest(self._returned.get()):
                self._num_claimed += len(claim.rows)
                self._put(claim)

    def _put(self, claim: Claim) -> None:
        while self._claims.qsize() >= self._num_ahead and not self._stop.is_set():
            if not self._room.wait(_POLL_S):
                self._claimer.poll()
                self.num_done = self._claimer.num_done
            self._room.clear()
        self._claims.put(claim)
