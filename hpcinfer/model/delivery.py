"""The weights of one rank on their way: its part of the reading of a store, and what ranks pass on to each other.

A source of weights for `hpcinfer.model.weights_of`, to be read in the order of the portions. The store is the last
resort: what a dead or silent rank was to send is read there. Bytes were compared with their checksums when they were
read; on their way they are in the hands of the MPI, as all other messages.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import Condition, Thread
from typing import TYPE_CHECKING

import numpy as np

from hpcinfer.dtypes import SCALES
from hpcinfer.errors import HpcInferError, RankFailedError, RevokedError
from hpcinfer.model.distribution import unit_bytes
from hpcinfer.model.portions import Portion, Share
from hpcinfer.model.transit import NUM_TAGS, PIECE_BYTES, Coming, Leaving, Senders, Tags, Way
from hpcinfer.weights.reader import StoredArray, StoredWeight
from hpcinfer.weights.schema import scale_name

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives
    from hpcinfer.weights.reader import Store

log = logging.getLogger(__name__)

LEAST_AHEAD, MOST_AHEAD = 2, 8  # portions on their way; as many may wait to be taken, and to leave
_AHEAD_BYTES = 256 << 20  # of them, as long as there are not too few
_NAP_S = 0.0005  # between two looks at messages


@dataclass
class Moved:
    """What has moved so far."""

    bytes_read: int = 0  # in the store, when all is here
    bytes_received: int = 0
    bytes_sent: int = 0
    last_read_s: float | None = None  # since the beginning; None until something is read
    last_byte_s: float | None = None  # since the beginning; None until all is here


class Delivery:
    """Reads, sends and receives, in one thread; gives the weights to another one, parameter by parameter.

    It sees to its messages in a thread of its own (`start`), or whenever `turn` is called.

    Args:
        store: which is read.
        portions: of this rank, see `hpcinfer.model.distribution`.
        group: all ranks that load; no other messages with these tags are on their way there.
        common: memory of parameters of which the ranks of a node have one copy.
    """

    def __init__(
        self, store: Store, portions: Sequence[Portion], group: Collectives,
        common: Mapping[str, np.ndarray] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.grains = store.config, store.grains
        self.moved = Moved()
        self._store, self.group = store, group
        self.portions = tuple(portions)
        self._common = dict(common or {})
        self.common_bytes = sum(array.nbytes for array in self._common.values())
        self._ahead, average = _ahead(store, portions), _average_bytes(store, portions)
        self.room_bytes = min(self._ahead + 1, len(portions)) * average  # of memory, for what leaves and is prepared
        self._tags = Tags()
        self._senders = Senders(group, self._tags)
        self._coming: deque[Coming] = deque()
        self._here: deque[dict[str, np.ndarray]] = deque()  # portions that wait to be taken
        self._leaving: deque[Leaving] = deque()
        self._change = Condition()
        self._num_changes = 0
        self.is_over = False  # nothing will move any more
        self._is_wanted = True  # by this rank itself
        self._is_stopped = False
        self._error: BaseException | None = None
        self._rest = deque(self.portions)
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="reading weights")
        self._bytes_before = store.bytes_read
        self._thread: Thread | None = None
        self.start_s = time.monotonic()

    def start(self) -> None:
        """Do all of it in another thread. Not collective."""
        self._thread = Thread(target=self._run, name="weights", daemon=True)
        self._thread.start()

    def turn(self) -> bool:
        """Move what can move now; what fails, fails whoever reads. Returns whether anything is left to do.

        Not collective, but the others do the same.
        """
        self._try_to_move()
        return not self.is_over

    def wait_for_change(self) -> None:
        """Wait until something has moved, or all is over. Not collective."""
        if self._thread is None:
            return self._pass_moment()
        with self._change:
            seen = self._num_changes
            self._change.wait_for(lambda: self._num_changes != seen or self.is_over)

    def wait(self) -> None:
        """Wait until all is over. Not collective, but the others do the same."""
        while not self.is_over:
            self.wait_for_change()

    def pass_on(self) -> None:
        """Give this rank nothing more: only others are served from now on. Not collective."""
        with self._change:
            self._is_wanted = False
            self._here.clear()
        self._wake()

    def stop(self) -> None:
        """End now, whatever others wait for. Not collective."""
        self._is_stopped = True
        self.pass_on()
        self.wait()

    def read(self, name: str, units: range | None = None) -> StoredArray:
        """Take all that this rank needs of a parameter; waits until it is here. Not collective."""
        with self._change:
            while (portion := self._portion_with(name)) is None:
                if self._error is not None:
                    raise self._error
                if not self._is_wanted:
                    raise HpcInferError("these weights are not wanted any more")
                self._change.wait()
            values = portion.pop(name)
            if not portion:
                self._here.remove(portion)
        self._wake()
        assert units is None or len(units) == len(values), f"{name = } {units = } {values.shape = }"
        return StoredArray(values, self._store.parameters[name].dtype)

    def read_weight(self, name: str, units: range | None = None) -> StoredWeight:
        """Take a weight with its scales, if it has any. See `read`."""
        values, dtype = self.read(name, units)
        scales = self.read(scale_name(name), units).values if dtype in SCALES else None
        return StoredWeight(values, dtype, scales)

    def _portion_with(self, name: str) -> dict[str, np.ndarray] | None:
        return next((portion for portion in self._here if name in portion), None)

    def _run(self) -> None:
        while not self.is_over:
            self._pass_moment()

    def _pass_moment(self) -> None:
        """Move what can move, or wait for a moment if nothing can."""
        seen = self._num_changes
        if not self._try_to_move() and not self.is_over:
            self._pause(seen)

    def _try_to_move(self) -> bool:
        """Move what can move now, unless all is over; returns whether something has moved."""
        if self.is_over:
            return False
        is_over = True
        try:
            has_moved = self._move_all()
            is_over = not (self._rest or self._coming or self._num_leaving())
        except BaseException as error:
            self._error = error
            for way in (way for portion in self._coming for way in portion.ways):
                with suppress(Exception):  # the first error is the one to be told
                    way.give_up()
            if not isinstance(error, Exception):
                raise
            return False
        finally:
            if is_over:
                self._readers.shutdown(wait=self._error is None, cancel_futures=True)
                self.is_over = True
                self._wake()
        return has_moved

    def _move_all(self) -> bool:
        """Look after all that is on its way; returns whether something has moved."""
        if self._is_stopped:
            raise HpcInferError("loading was stopped")
        rest, coming, has_moved = self._rest, self._coming, False
        if rest and len(coming) < self._ahead and self._has_room():
            coming.append(self._begin(rest.popleft()))
            has_moved = True
        for portion in coming:
            has_moved |= self._move(portion)
        while coming and coming[0].is_here:
            portion = coming.popleft()
            if not (rest or coming):
                self._note_end(self._store.bytes_read - self._bytes_before)
            self._deliver(portion)
        return has_moved

    def _begin(self, portion: Portion) -> Coming:
        """Make room for a portion, let what others send come, and start to read the rest."""
        arrays = {name: self._common.pop(name) if name in self._common else self._store.empty(name, len(units))
                  for name, units in portion.needs.items()}  # fmt: skip
        ways = [self._way(share, arrays[share.name], portion.needs[share.name]) for share in portion.shares]
        own = [way for way in ways if way.share.sender is None]
        if own:
            self._read(own)
        for way in ways:
            if way.share.sender is not None:
                self._receive(way, way.share.sender)
        return Coming(arrays, ways)

    def _way(self, share: Share, values: np.ndarray, needs: range) -> Way:
        part = values[share.units.start - needs.start : share.units.stop - needs.start]
        way = Way(share, part.reshape(-1).view(np.uint8), {})
        for rank in (*share.receivers, *share.told):
            count = len(way.pieces(is_told=rank in share.told))
            way.tags[rank] = self._tags.following(self.group.rank, rank, count)
        return way

    def _read(self, ways: Sequence[Way], *, is_shared: bool = False) -> None:
        units = [unit for way in ways for unit in way.unit_reads()]
        reading = self._readers.submit(self._store.read_into, units, is_shared=is_shared)
        reading.add_done_callback(lambda _: self._wake())
        for way in ways:
            way.reading = reading

    def _receive(self, way: Way, sender: int) -> None:
        try:
            if not self._senders.let_come(way, sender):
                self._read_instead(way)
        except RankFailedError as error:
            self._give_up(way, error)

    def _move(self, portion: Coming) -> bool:
        """Look whether something has come; pass it on."""
        has_moved = False
        for way in portion.ways:
            if not way.is_here and self._has_come(way):
                way.is_here = has_moved = True
                self._send(way, portion)
        return has_moved

    def _has_come(self, way: Way) -> bool:
        if way.receiving:
            self._listen(way)
        if way.reading is None and not way.receiving:
            if not way.share.is_told:
                self.moved.bytes_received += len(way.raw)
                for each in way.unit_reads():
                    self._store.keep(*each)
            return True
        if way.reading is None or not way.reading.done():
            return False
        way.reading.result()
        self.moved.last_read_s = time.monotonic() - self.start_s
        if way.share.sender is not None:
            self._tags.spoil(way.share.sender, way.give_up())
        return True

    def _listen(self, way: Way) -> None:
        """Take what has come; the store stands in for who is dead or silent."""
        sender = way.share.sender
        assert sender is not None, f"{way.share = }"
        try:
            if not self._senders.listen(way, sender) and way.reading is None:
                log.info("rank %d sends no weights: they are read from the store", sender)
                self._read_instead(way)  # should the message come after all, it brings the same bytes
        except RankFailedError as error:
            self._give_up(way, error)

    def _give_up(self, way: Way, error: RankFailedError) -> None:
        """Read from the store what a dead rank was to send."""
        if isinstance(error, RevokedError):
            raise error
        way.give_up()
        if way.reading is None:
            self._read_instead(way)

    def _read_instead(self, way: Way) -> None:
        """Read what another rank was to send; others of the node may use the memory already, if they share it."""
        self._read([way], is_shared=way.share.is_told or bool(way.share.told))

    def _send(self, way: Way, portion: Coming) -> None:
        for rank, tags in way.tags.items():
            pieces = way.pieces(is_told=rank in way.share.told)
            for piece, tag in zip(pieces, tags, strict=True):
                portion.leaving.append(self.group.send(piece, rank, tag))
        self.moved.bytes_sent += len(way.raw) * len(way.share.receivers)

    def _deliver(self, portion: Coming) -> None:
        self._leaving.append(Leaving(portion.leaving))
        with self._change:
            if portion.arrays and self._is_wanted:
                self._here.append(portion.arrays)
        self._wake()

    def _note_end(self, bytes_read: int) -> None:
        self.moved.bytes_read = bytes_read
        self.moved.last_byte_s = time.monotonic() - self.start_s

    def _has_room(self) -> bool:
        return self._num_leaving() < self._ahead and len(self._here) < self._ahead

    def _num_leaving(self) -> int:
        """Portions of which something has not left, but for ranks that do not take it."""
        while self._leaving and self._leaving[0].is_over():
            self._leaving.popleft()
        return len(self._leaving)

    def _pause(self, seen: int) -> None:
        """Wait until something has changed; messages must be looked for."""
        is_talking = bool(self._leaving) or any(portion.is_talking for portion in self._coming)
        with self._change:
            self._change.wait_for(lambda: self._num_changes != seen, _NAP_S if is_talking else None)

    def _wake(self) -> None:
        with self._change:
            self._num_changes += 1
            self._change.notify_all()


def _ahead(store: Store, portions: Sequence[Portion]) -> int:
    """How many portions of average size to have on their way: fewer than there are tags for their messages."""
    most = max((sum(_num_pieces(store, share) for share in portion.shares) for portion in portions), default=0)
    count = max(LEAST_AHEAD, min(MOST_AHEAD, _AHEAD_BYTES // max(1, _average_bytes(store, portions))))
    return max(1, min(count, NUM_TAGS // max(1, most)))


def _num_pieces(store: Store, share: Share) -> int:
    """Messages to or from one rank, at most."""
    return -(-unit_bytes(store, share.name) * len(share.units) // PIECE_BYTES)


def _average_bytes(store: Store, portions: Sequence[Portion]) -> int:
    sizes = [unit_bytes(store, name) * len(units) for portion in portions for name, units in portion.needs.items()]
    return sum(sizes) // max(1, len(portions))
