"""The weights of one rank on their way: its part of the reading of a store, and what ranks pass on to each other.

A source of weights for `hpcinfer.model.weights_of`, to be read in the order of the portions. The store is the last
resort: what a dead or silent rank was to send is read there. Bytes were compared with their checksums when they were
read; on their way they are in the hands of the MPI, as all other messages.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import TYPE_CHECKING

import numpy as np

from hpcinfer.dtypes import SCALES
from hpcinfer.errors import HpcInferError, RankFailedError, RevokedError
from hpcinfer.model.distribution import Portion, Share, unit_bytes
from hpcinfer.weights.reader import StoredArray, StoredWeight, UnitRead
from hpcinfer.weights.schema import scale_name

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives, Pending
    from hpcinfer.weights.reader import Store

log = logging.getLogger(__name__)

PATIENCE_S = 60.0  # of silence, until a rank that lives is not waited for any more
LEAST_AHEAD, MOST_AHEAD = 2, 8  # portions on their way; as many may wait to be taken, and to leave
_AHEAD_BYTES = 256 << 20  # of them, as long as there are not too few
_PIECE_BYTES = 32 << 20  # of a message
_FIRST_TAG, _NUM_TAGS = 64, 896  # free on a line: below are messages, from 1024 on groups that can lose members
_NAP_S = 0.0005  # between two looks at messages


@dataclass
class Traffic:
    """What has moved so far."""

    bytes_read: int = 0  # in the store, when all is here
    bytes_received: int = 0
    bytes_sent: int = 0
    last_read_s: float | None = None  # since the beginning; None until something is read
    last_byte_s: float | None = None  # since the beginning; None until all is here


@dataclass
class _Way:
    """A share of this rank, and how it comes."""

    share: Share
    raw: np.ndarray  # all bytes of it
    tags: dict[int, list[int]]  # of its pieces, by receiver
    start: float  # when it began to come
    receiving: list[Pending] = field(default_factory=list)
    reading: Future[None] | None = None
    is_here: bool = False


@dataclass
class _Coming:
    """A portion on its way."""

    arrays: dict[str, np.ndarray]
    ways: list[_Way]
    leaving: list[Pending] = field(default_factory=list)

    @property
    def is_here(self) -> bool:
        """Whether all of it has come; then all that is to be passed on is on its way."""
        return all(way.is_here for way in self.ways)


@dataclass
class _Leaving:
    """What has been sent of a portion."""

    messages: list[Pending]
    start: float

    def is_over(self) -> bool:
        """Whether all has left, or is left to itself."""
        return all(each.test() for each in self.messages) or time.monotonic() - self.start > PATIENCE_S


class Delivery:
    """Reads, sends and receives, in one thread; gives the weights to another one, parameter by parameter.

    Args:
        store: which is read.
        portions: of this rank, see `hpcinfer.model.distribution`.
        group: all ranks that load; no other messages with these tags are on their way there.
    """

    def __init__(self, store: Store, portions: Sequence[Portion], group: Collectives) -> None:
        self.config, self.grains = store.config, store.grains
        self.traffic = Traffic()
        self._store, self._group = store, group
        self.portions = tuple(portions)
        self._ahead = _ahead(store, portions)
        self._numbers: Counter[tuple[int, int]] = Counter()  # of pieces so far, by sender and receiver
        self._here: deque[dict[str, np.ndarray]] = deque()  # portions that wait to be taken
        self._leaving: deque[_Leaving] = deque()
        self._heard: dict[int, float] = {}  # when a rank has last sent something
        self._silent: set[int] = set()  # ranks that are not waited for
        self._change = Condition()
        self._num_changes = 0
        self._error: BaseException | None = None
        self._thread: Thread | None = None
        self.start_s = time.monotonic()

    def start(self) -> None:
        """Do all of it in another thread. Not collective."""
        self._thread = Thread(target=self.run, name="weights", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until that thread has come to its end. Not collective."""
        if self._thread is not None:
            self._thread.join()

    def run(self) -> None:
        """Do all of it; what fails, fails whoever reads. Not collective, but the others do the same."""
        with ThreadPoolExecutor(2, thread_name_prefix="reading weights") as readers:
            try:
                self._run(readers)
            except BaseException as error:
                with self._change:
                    self._error = error
                    self._change.notify_all()

    def drain(self) -> None:
        """Take all and throw it away, as far as it comes. Not collective."""
        with suppress(HpcInferError):
            for portion in self.portions:
                for name in portion.needs:
                    self.read(name)

    def read(self, name: str, units: range | None = None) -> StoredArray:
        """Take all that this rank needs of a parameter; waits until it is here. Not collective."""
        with self._change:
            while (portion := self._portion_with(name)) is None:
                if self._error is not None:
                    raise self._error
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

    def _run(self, readers: ThreadPoolExecutor) -> None:
        before, rest, coming = self._store.bytes_read, deque(self.portions), deque[_Coming]()
        while rest or coming:
            seen, has_moved = self._num_changes, False
            if rest and len(coming) < self._ahead and self._has_room():
                coming.append(self._begin(rest.popleft(), readers))
                has_moved = True
            for portion in coming:
                has_moved |= self._move(portion, readers)
            while coming and coming[0].is_here:
                portion = coming.popleft()
                if not (rest or coming):
                    self._note_end(self._store.bytes_read - before)
                self._deliver(portion)
            if not has_moved:
                self._pause(seen, coming)
        self._see_off()

    def _begin(self, portion: Portion, readers: ThreadPoolExecutor) -> _Coming:
        """Make room for a portion, let what others send come, and start to read the rest."""
        arrays = {name: self._store.empty(name, len(units)) for name, units in portion.needs.items()}
        ways = [self._way(share, arrays[share.name], portion.needs[share.name]) for share in portion.shares]
        own = [way for way in ways if way.share.sender is None]
        if own:
            self._read(own, readers)
        for way in ways:
            if way.share.sender is not None:
                self._receive(way, way.share.sender, readers)
        return _Coming(arrays, ways)

    def _way(self, share: Share, values: np.ndarray, needs: range) -> _Way:
        part = values[share.units.start - needs.start : share.units.stop - needs.start]
        raw = part.reshape(-1).view(np.uint8)
        count = -(-len(raw) // _PIECE_BYTES)
        tags = {rank: self._tags(self._group.rank, rank, count) for rank in share.receivers}
        return _Way(share, raw, tags, time.monotonic())

    def _tags(self, sender: int, receiver: int, count: int) -> list[int]:
        """Tags of the next messages between two ranks: both count them in the order of the plan."""
        first = self._numbers[sender, receiver]
        self._numbers[sender, receiver] += count
        return [_FIRST_TAG + number % _NUM_TAGS for number in range(first, first + count)]

    def _read(self, ways: Sequence[_Way], readers: ThreadPoolExecutor) -> None:
        reading = readers.submit(self._store.read_into, [unit for way in ways for unit in _unit_reads(way)])
        reading.add_done_callback(lambda _: self._wake())
        for way in ways:
            way.reading = reading

    def _receive(self, way: _Way, sender: int, readers: ThreadPoolExecutor) -> None:
        pieces = _pieces(way.raw)
        tags = self._tags(sender, self._group.rank, len(pieces))
        try:
            for piece, tag in zip(pieces, tags, strict=True):
                way.receiving.append(self._group.start_receive(piece, sender, tag))
        except RankFailedError as error:
            self._give_up(way, error, readers)
        else:
            if sender in self._silent:
                self._read([way], readers)

    def _move(self, portion: _Coming, readers: ThreadPoolExecutor) -> bool:
        """Look whether something has come; pass it on."""
        has_moved = False
        for way in portion.ways:
            if not way.is_here and self._has_come(way, readers):
                way.is_here = has_moved = True
                self._send(way, portion)
        return has_moved

    def _has_come(self, way: _Way, readers: ThreadPoolExecutor) -> bool:
        if way.reading is not None:
            if way.reading.done():
                way.reading.result()
                self.traffic.last_read_s = time.monotonic() - self.start_s
            return way.reading.done()
        sender = way.share.sender
        assert sender is not None, f"{way.share = }"
        try:
            is_here = all(piece.test() for piece in way.receiving)
        except RankFailedError as error:
            self._give_up(way, error, readers)
            return False
        if is_here:
            self._heard[sender] = time.monotonic()
            self.traffic.bytes_received += len(way.raw)
            for each in _unit_reads(way):
                self._store.keep(*each)
        elif time.monotonic() - max(self._heard.get(sender, 0.0), way.start) > PATIENCE_S:
            log.info("rank %d sends no weights: they are read from the store", sender)
            self._silent.add(sender)
            self._read([way], readers)  # should the message come after all, it brings the same bytes
        return is_here

    def _give_up(self, way: _Way, error: RankFailedError, readers: ThreadPoolExecutor) -> None:
        """Read from the store what a dead rank was to send."""
        if isinstance(error, RevokedError):
            raise error
        for piece in way.receiving:
            piece.cancel()
        self._read([way], readers)

    def _send(self, way: _Way, portion: _Coming) -> None:
        for rank, tags in way.tags.items():
            for piece, tag in zip(_pieces(way.raw), tags, strict=True):
                portion.leaving.append(self._group.send(piece, rank, tag))
            self.traffic.bytes_sent += len(way.raw)

    def _deliver(self, portion: _Coming) -> None:
        self._leaving.append(_Leaving(portion.leaving, time.monotonic()))
        with self._change:
            if portion.arrays:
                self._here.append(portion.arrays)
            self._change.notify_all()

    def _note_end(self, bytes_read: int) -> None:
        self.traffic.bytes_read = bytes_read
        self.traffic.last_byte_s = time.monotonic() - self.start_s

    def _has_room(self) -> bool:
        return self._num_leaving() < self._ahead and len(self._here) < self._ahead

    def _num_leaving(self) -> int:
        """Portions of which something has not left, but for ranks that do not take it."""
        while self._leaving and self._leaving[0].is_over():
            self._leaving.popleft()
        return len(self._leaving)

    def _pause(self, seen: int, coming: Sequence[_Coming]) -> None:
        """Wait until something has changed; messages must be looked for."""
        is_talking = bool(self._leaving) or any(way.receiving for portion in coming for way in portion.ways)
        with self._change:
            self._change.wait_for(lambda: self._num_changes != seen, _NAP_S if is_talking else None)

    def _see_off(self) -> None:
        """Wait until all messages have left."""
        while self._num_leaving():
            with self._change:
                self._change.wait(_NAP_S)

    def _wake(self) -> None:
        with self._change:
            self._num_changes += 1
            self._change.notify_all()


def _ahead(store: Store, portions: Sequence[Portion]) -> int:
    """How many portions of average size to have on their way."""
    sizes = [unit_bytes(store, name) * len(units) for portion in portions for name, units in portion.needs.items()]
    average = sum(sizes) // max(1, len(portions))
    return max(LEAST_AHEAD, min(MOST_AHEAD, _AHEAD_BYTES // max(1, average)))


def _unit_reads(way: _Way) -> Iterator[UnitRead]:
    size = len(way.raw) // len(way.share.units)
    for place, unit in enumerate(way.share.units):
        yield UnitRead(way.share.name, unit, way.raw[place * size : (place + 1) * size])


def _pieces(raw: np.ndarray) -> list[np.ndarray]:
    return [raw[start : start + _PIECE_BYTES] for start in range(0, len(raw), _PIECE_BYTES)]
