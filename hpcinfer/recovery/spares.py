"""Spare ranks, as far as this rank has heard of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

_TAG_SPARE = 24


class Spares:
    """Who can take a dead rank's place. A rank that has become a spare one tells all others."""

    def __init__(self, mail: Collectives, ranks: Iterable[int]) -> None:
        """Begin with the ranks of the world that were kept warm from the start."""
        self._mail, self._known = mail, dict.fromkeys(ranks)

    def known(self) -> list[int]:
        """Those that live and are free, as far as is known. Not collective."""
        while (message := self._mail.probe_bytes(_TAG_SPARE)) is not None:
            self._known[message[0]] = None
        return [rank for rank in self._known if rank not in self._mail.failed()]

    def is_idle(self, rank: int) -> bool:
        """Whether a rank is one of them. Not collective."""
        return rank in self.known()

    def forget(self, ranks: Iterable[int]) -> None:
        """They have joined a replica. Not collective."""
        for rank in ranks:
            self._known.pop(rank, None)

    def announce(self) -> None:
        """Tell all ranks that this one is free. Not collective."""
        for rank in range(self._mail.size):
            if rank not in self._mail.failed():
                self._mail.send_bytes(b"", rank, _TAG_SPARE)
