"""A group that can lose members: point-to-point messages over the world alone, under a number of its own.

No communicator is built, so none has to be built again with dead ranks in the world, which MPI implementations refuse
(Open MPI 5.0: MPI_Comm_create_group and MPI_Intercomm_create fail after a death outside of the group).
A death of any watched rank ends every call with `RankFailedError`; the survivors meet in `hpcinfer.comm.regroup`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcinfer.comm.exchange import RepeatedMessages
from hpcinfer.comm.protocol import Buffer, Messages, Pending
from hpcinfer.comm.waiting import wait_for
from hpcinfer.errors import RankFailedError
from hpcinfer.partition.topology import Location

if TYPE_CHECKING:
    from hpcinfer.comm.mpi import MpiGroup

_TAGS, _CONTEXTS, _EPOCHS = 64, 16, 1 << 20  # of a group, of an epoch, before numbers come again
_LONG_S = 0.02  # who waits for bytes longer than this is idle
_TAG_OBJECT, _TAG_ARRAY = 62, 63  # of collectives; lower ones are for messages


class TolerantGroup:
    """Some ranks of a world, numbered by their place in `members`.

    Args:
        line: all ranks of the world; it outlives any member.
        members: their ranks in it, this rank's among them.
        epoch: a number that no two of them have shared before, at least 1: late messages of dead groups find nobody.
    """

    def __init__(
        self, line: MpiGroup, members: Sequence[int], epoch: int, *, context: int = 0, watched: Sequence[int] = ()
    ) -> None:
        self.members, self.epoch = tuple(members), epoch
        self.rank, self.size = self.members.index(line.rank), len(members)
        self._line, self._context = line, context
        self._watched = frozenset(watched or members)
        self._base = ((epoch % _EPOCHS) * _CONTEXTS + context) * _TAGS
        self._num_splits = 0
        # Called while a rank has waited for bytes for long; says whether it wants to be called again soon.
        self.while_idle: Callable[[], bool | None] | None = None

    @property
    def locations(self) -> tuple[Location, ...] | None:
        """Where the members run, by rank; None if unknown."""
        known = self._line.locations
        return known and tuple(known[member] for member in self.members)

    def check(self) -> None:
        """Raise if a watched rank is known to have died. Not collective.

        Raises:
            RankFailedError: one has.
        """
        if dead := self._line.failed() & self._watched:
            raise RankFailedError(f"rank {', '.join(map(str, sorted(dead)))} of the world has died")

    def failed(self) -> frozenset[int]:
        """Members that are known to have died."""
        dead = self._line.failed()
        return frozenset(rank for rank, member in enumerate(self.members) if member in dead)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.all_gather_bytes(b"")

    def broadcast_bytes(self, data: bytes | None, root: int = 0) -> bytes:
        """Give every rank root's bytes."""
        if self.rank != root:
            return self.receive_bytes(root, _TAG_OBJECT)
        assert data is not None, "root must give bytes"
        self.wait_all([self.send_bytes(data, peer, _TAG_OBJECT) for peer in self._peers()])
        return data

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Give every rank the bytes of all, by rank."""
        sent = [self.send_bytes(data, peer, _TAG_OBJECT) for peer in self._peers()]
        gathered = {peer: self.receive_bytes(peer, _TAG_OBJECT) for peer in self._peers()}
        self.wait_all(sent)
        return [gathered.get(rank, data) for rank in range(self.size)]

    def all_gather(self, send: Buffer, receive: Buffer, counts: Sequence[int]) -> None:
        """Concatenate float32 buffers of `counts[rank]` elements into `receive`, by rank, on every rank."""
        parts = _parts(receive, counts)
        parts[self.rank][:] = np.asarray(send).reshape(-1)
        sent = [self.send(parts[self.rank], peer, _TAG_ARRAY) for peer in self._peers()]
        self._receive_all({peer: parts[peer] for peer in self._peers()}, _TAG_ARRAY)
        self.wait_all(sent)

    def gather(self, send: Buffer, receive: Buffer | None, counts: Sequence[int], root: int = 0) -> None:
        """The same, on root only."""
        flat = np.asarray(send).reshape(-1)
        if self.rank != root:
            return self.wait_all([self.send(flat, root, _TAG_ARRAY)])
        parts = _parts(receive, counts)
        parts[root][:] = flat
        self._receive_all({peer: parts[peer] for peer in self._peers()}, _TAG_ARRAY)

    def send(self, buffer: Buffer, peer: int, tag: int = 0) -> Pending:
        """Start sending a contiguous buffer; to a dead rank it is lost."""
        return self._line.send(buffer, self.members[peer], self._base + tag)

    def receive(self, buffer: Buffer, peer: int, tag: int = 0) -> None:
        """Wait for a buffer of known size."""
        self._receive_all({peer: buffer}, tag)

    def start_receive(self, buffer: Buffer, peer: int, tag: int = 0) -> Pending:
        """Let a buffer of known size come."""
        return self._line.start_receive(buffer, self.members[peer], self._base + tag)

    def wait_all(self, pending: Sequence[Pending]) -> None:
        """Wait until all these messages have arrived or left; after a death no buffer is written to any more."""
        wait_for(pending, self._line.pause(), self.check)

    def prepare_exchange(self, outgoing: Messages, incoming: Messages, tag: int) -> RepeatedMessages:
        """Prepare buffers that are sent and received again and again."""
        return RepeatedMessages(self, outgoing, incoming, tag)

    def send_bytes(self, data: bytes, peer: int, tag: int = 0) -> Pending:
        """Start sending bytes of any length; to a dead rank they are lost."""
        return self._line.send_bytes(data, self.members[peer], self._base + tag)

    def receive_bytes(self, peer: int, tag: int = 0) -> bytes:
        """Wait for bytes; yields the core while waiting."""
        pause, start = self._line.pause(), time.monotonic()
        while (data := self._line.probe_bytes_of(self.members[peer], self._base + tag)) is None:
            self.check()
            if self.while_idle is not None and time.monotonic() - start > _LONG_S:
                self.while_idle()
            pause()
        return data

    def probe_bytes(self, tag: int) -> tuple[int, bytes] | None:
        """Take one waiting message of that tag from any member: (rank, bytes), or None at once."""
        message = self._line.probe_bytes(self._base + tag)
        return message and (self.members.index(message[0]), message[1])

    def split(self, color: int, key: int) -> TolerantGroup:
        """Make the group of ranks with the same colour, ordered by key. It watches all ranks that this one watches."""
        self._num_splits += 1
        context = 4 * self._context + self._num_splits
        assert context < _CONTEXTS and self._num_splits < 4, f"{context = } {self._num_splits = }"
        wishes = [tuple(map(int, wish.split())) for wish in self.all_gather_bytes(b"%d %d" % (color, key))]
        chosen = sorted((key, rank) for rank, (wanted, key) in enumerate(wishes) if wanted == color)
        members = [self.members[rank] for _, rank in chosen]
        return TolerantGroup(self._line, members, self.epoch, context=context, watched=tuple(self._watched))

    def abort(self, exit_code: int) -> None:
        """End every rank of the job, now."""
        self._line.abort(exit_code)

    def _peers(self) -> list[int]:
        """All others, each rank beginning with its successor."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def _receive_all(self, buffers: dict[int, Any], tag: int) -> None:
        self.wait_all([self.start_receive(buffer, peer, tag) for peer, buffer in buffers.items()])


def _parts(receive: Buffer | None, counts: Sequence[int]) -> list[np.ndarray]:
    """Views of a buffer, one for each rank."""
    assert receive is not None, "root must give a buffer"
    ends = list(accumulate(counts))
    flat = np.asarray(receive).reshape(-1)
    return [flat[end - count : end] for end, count in zip(ends, counts, strict=True)]
