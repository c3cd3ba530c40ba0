"""Weights between ranks: shares that come and leave in pieces, the tags of their messages, who has fallen silent.

Both ends of a message number it in the order of the plan, so that no rank tells another what it sends. There are fewer
tags than messages: a message that was given up, and may still come, spoils its tag.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpcinfer.model.portions import Share
from hpcinfer.weights.reader import UnitRead

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives, Pending

PATIENCE_S = 60.0  # of silence, until a rank that lives is not waited for any more
PIECE_BYTES = 32 << 20  # of a message
_SLOW_BYTES_PER_S = 10e6  # of a rank that reads a share before it sends it
FIRST_TAG, NUM_TAGS = 64, 896  # free on a line: below are messages, from 1024 on groups that can lose members


class Piece(NamedTuple):
    """A message that has not come."""

    message: Pending
    tag: int


@dataclass
class Way:
    """A share of this rank, and how it comes."""

    share: Share
    raw: np.ndarray  # all bytes of it
    tags: dict[int, list[int]]  # of its pieces, by receiver
    receiving: list[Piece] = field(default_factory=list)
    reading: Future[None] | None = None
    is_here: bool = False
    start: float = field(default_factory=time.monotonic)  # when it began to come

    def pieces(self, *, is_told: bool) -> list[np.ndarray]:
        """Bytes of each message; a word is enough for who has the memory in which they lie."""
        if is_told:
            return [np.zeros(1, np.uint8)]
        return [self.raw[start : start + PIECE_BYTES] for start in range(0, len(self.raw), PIECE_BYTES)]

    def unit_reads(self) -> Iterator[UnitRead]:
        """Where each unit belongs."""
        size = len(self.raw) // len(self.share.units)
        for place, unit in enumerate(self.share.units):
            yield UnitRead(self.share.name, unit, self.raw[place * size : (place + 1) * size])

    def take(self) -> int:
        """Look for messages; returns how many have come."""
        before = len(self.receiving)
        self.receiving = [piece for piece in self.receiving if not piece.message.test()]
        return before - len(self.receiving)

    def give_up(self) -> list[int]:
        """Receive no more; returns the tags of messages that have not come."""
        given_up, self.receiving = self.receiving, []
        for piece in given_up:
            piece.message.cancel()
        return [piece.tag for piece in given_up]


@dataclass
class Coming:
    """A portion on its way."""

    arrays: dict[str, np.ndarray]
    ways: list[Way]
    leaving: list[Pending] = field(default_factory=list)

    @property
    def is_here(self) -> bool:
        """Whether all of it has come; then all that is to be passed on is on its way."""
        return all(way.is_here for way in self.ways)

    @property
    def is_talking(self) -> bool:
        """Whether messages of it are under way."""
        return bool(self.leaving) or any(way.receiving for way in self.ways)


@dataclass
class Leaving:
    """What has been sent of a portion."""

    messages: list[Pending]
    start: float = field(default_factory=time.monotonic)

    def is_over(self) -> bool:
        """Whether all has left, or is left to itself."""
        return all(each.test() for each in self.messages) or time.monotonic() - self.start > PATIENCE_S


class Tags:
    """Tags of the messages of one rank."""

    def __init__(self) -> None:
        self._numbers: Counter[tuple[int, int]] = Counter()  # of messages so far, by sender and receiver
        self._spoiled: set[tuple[int, int]] = set()  # sender and tag: an old message may come instead of a new one

    def following(self, sender: int, receiver: int, count: int) -> list[int]:
        """Tags of the next messages between two ranks."""
        first = self._numbers[sender, receiver]
        self._numbers[sender, receiver] += count
        return [FIRST_TAG + number % NUM_TAGS for number in range(first, first + count)]

    def spoil(self, sender: int, tags: list[int]) -> None:
        """Messages of a rank were given up."""
        self._spoiled.update((sender, tag) for tag in tags)

    def are_clean(self, sender: int, tags: list[int]) -> bool:
        """Whether nothing else can come with these."""
        return not any((sender, tag) in self._spoiled for tag in tags)


class Senders:
    """Who sends, and who should."""

    def __init__(self, group: Collectives, tags: Tags) -> None:
        self._group, self._tags = group, tags
        self._heard: dict[int, float] = {}  # when something has last come from a rank
        self._silent: set[int] = set()

    def let_come(self, way: Way, sender: int) -> bool:
        """Begin to receive; returns whether that may be waited for.

        Raises:
            RankFailedError: the sender has died.
        """
        pieces = way.pieces(is_told=way.share.is_told)
        tags = self._tags.following(sender, self._group.rank, len(pieces))
        if not self._tags.are_clean(sender, tags):
            self._tags.spoil(sender, tags)
            return False
        for piece, tag in zip(pieces, tags, strict=True):
            way.receiving.append(Piece(self._group.start_receive(piece, sender, tag), tag))
        return sender not in self._silent

    def listen(self, way: Way, sender: int) -> bool:
        """Take what has come of a share; returns whether the rest may be waited for.

        Raises:
            RankFailedError: the sender has died.
        """
        now = time.monotonic()
        if way.take():
            self._heard[sender] = now
            self._silent.discard(sender)
        elif now - max(self._heard.get(sender, 0.0), way.start) > PATIENCE_S + len(way.raw) / _SLOW_BYTES_PER_S:
            self._silent.add(sender)
            return False
        return True
