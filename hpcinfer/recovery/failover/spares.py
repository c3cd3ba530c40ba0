"""Spare ranks, as far as this rank has heard of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

_TAG_SPARE = 24
_FREE, _TAKEN = b"free", b"taken"


class Spares:
    """Who can take a dead rank's place. A rank tells all others when it has become a spare one, or is none any more."""

    def __init__(self, mail: Collectives, ranks: Iterable[int]) -> None:
        """Begin with the ranks of the world that were kept warm from the start."""
        self._mail, self._known = mail, dict.fromkeys(ranks)

    def known(self) -> list[int]:
        """Those that live and are free, as far as is known. Not collective."""
        while (message := self._mail.probe_bytes(_TAG_SPARE)) is not None:
            rank, word = message
            if word == _FREE:
                self._known[rank] = None
            else:
                self._known.pop(rank, None)
        return [rank for rank in self._known if rank not in self._mail.failed()]

    def is_idle(self, rank: int) -> bool:
        """Whether a rank is one of them. Not collective."""
        return rank in self.known()

    def forget(self, ranks: Iterable[int]) -> None:
        """They have joined a replica. Not collective."""
        for rank in ranks:
            self._known.pop(rank, None)

    def announce(self, *, is_free: bool) -> None:
        """Tell all ranks that this one is free, or that it has joined a replica. Not collective."""
        for rank in range(self._mail.size):
            if rank not in self._mail.failed():
                self._mail.send_bytes(_FREE if is_free else _TAKEN, rank, _TAG_SPARE)
