"""`Collectives` over mpi4py. Importing this module starts MPI.

With a fault-tolerant MPI a dead rank raises `RankFailedError` in those that wait for it; the verbs revoke, agree and
shrink are ULFM's. Without one the launcher ends the job, and none of that happens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate

from mpi4py import MPI

from hpcinfer.comm.exchange import RepeatedMessages
from hpcinfer.comm.library import has_threads, is_fault_tolerant
from hpcinfer.comm.mpi_messages import (
    UNFINISHED,
    MpiPending,
    MpiReceive,
    PersistentMessages,
    prune,
    rank_failure,
    translated,
)
from hpcinfer.comm.protocol import Buffer, Exchange, Messages, Pending
from hpcinfer.comm.waiting import Pause, wait_for
from hpcinfer.partition.topology import Location


class MpiGroup:
    """Ranks that share a communicator. Buffers move with mpi4py's upper-case methods: nothing is pickled.

    What blocks in an MPI may hold its core for as long as it waits (MPICH spins on `sched_yield`, which need not give
    way to other processes). So nothing that may last is waited for there: calls are started, and looked at between
    naps, with whatever is to go on meanwhile. Fault-tolerant collectives block where they may: Open MPI's non-blocking
    ones write to stderr when a rank has died.

    Making one without a parent is collective.
    """

    def __init__(self, comm: MPI.Comm, parent: MpiGroup | None = None) -> None:
        self._comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.locations = None if parent is None else parent._locations_of(comm)
        self.is_tolerant = is_fault_tolerant()
        self._may_block: bool = self.is_tolerant and _have_threads(comm) if parent is None else parent._may_block
        self._failed: frozenset[int] = frozenset()

    @translated
    def barrier(self) -> None:
        """Wait until every rank is here."""
        self._take_part("Barrier")

    @translated
    def broadcast_bytes(self, data: bytes | None, root: int = 0) -> bytes:
        """Give every rank root's bytes."""
        length, own = bytearray(8), data if self.rank == root else None
        if self.rank == root:
            assert own is not None, "root must give bytes"
            length[:] = len(own).to_bytes(8, "little")
        self._take_part("Bcast", [length, MPI.BYTE], root)
        buffer = bytearray(int.from_bytes(length, "little") if own is None else own)
        self._take_part("Bcast", [buffer, MPI.BYTE], root)
        return bytes(buffer)

    @translated
    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Give every rank the bytes of all, by rank."""
        lengths = bytearray(8 * self.size)
        self._take_part("Allgather", [len(data).to_bytes(8, "little"), MPI.BYTE], [lengths, MPI.BYTE])
        counts = [int.from_bytes(lengths[8 * r : 8 * r + 8], "little") for r in range(self.size)]
        starts = [0, *accumulate(counts)]
        buffer = bytearray(starts[-1])
        self._take_part("Allgatherv", [data, MPI.BYTE], [buffer, counts, starts[:-1], MPI.BYTE])
        return [bytes(buffer[starts[r] : starts[r + 1]]) for r in range(self.size)]

    @translated
    def all_gather(self, send: Buffer, receive: Buffer, counts: Sequence[int]) -> None:
        """Concatenate float32 buffers of `counts[rank]` elements into `receive`, by rank, on every rank."""
        whole = [receive, counts, _starts(counts), MPI.FLOAT]
        self._take_part("Allgatherv", [send, counts[self.rank], MPI.FLOAT], whole)

    @translated
    def gather(self, send: Buffer, receive: Buffer | None, counts: Sequence[int], root: int = 0) -> None:
        """Concatenate float32 buffers of `counts[rank]` elements into root's `receive`."""
        into = [receive, counts, _starts(counts), MPI.FLOAT] if self.rank == root else None
        self._take_part("Gatherv", [send, counts[self.rank], MPI.FLOAT], into, root)

    def send(self, buffer: Buffer, peer: int, tag: int = 0) -> MpiPending:
        """Start sending a contiguous buffer; to a dead rank it is lost."""
        try:
            request = self._comm.Isend(buffer, peer, tag)
        except MPI.Exception as error:
            if rank_failure(error) is None:
                raise
            request = MPI.REQUEST_NULL
        return MpiPending(request, buffer)

    @translated
    def receive(self, buffer: Buffer, peer: int, tag: int = 0) -> None:
        """Wait for a buffer of known size."""
        self.start_receive(buffer, peer, tag).wait()

    @translated
    def start_receive(self, buffer: Buffer, peer: int, tag: int = 0) -> MpiReceive:
        """Let a buffer of known size come."""
        if UNFINISHED:
            prune()
        return MpiReceive(self._comm.Irecv(buffer, peer, tag), buffer)

    def wait_all(self, pending: Sequence[Pending]) -> None:
        """Wait until all these messages have arrived or left."""
        wait_for(pending, Pause(), lambda: None)

    @translated
    def prepare_exchange(self, outgoing: Messages, incoming: Messages, tag: int) -> Exchange:
        """Prepare buffers that are sent and received again and again."""
        if self.is_tolerant:
            return RepeatedMessages(self, outgoing, incoming, tag)
        if UNFINISHED:
            prune()
        requests = [self._comm.Recv_init(buffer, peer, tag) for buffer, peer in incoming]
        requests += [self._comm.Send_init(buffer, peer, tag) for buffer, peer in outgoing]
        return PersistentMessages(requests, (outgoing, incoming))

    def send_bytes(self, data: bytes, peer: int, tag: int = 0) -> MpiPending:
        """Start sending bytes of any length; to a dead rank they are lost."""
        return self.send([data, MPI.BYTE], peer, tag)

    def receive_bytes(self, peer: int, tag: int = 0) -> bytes:
        """Wait for bytes; yields the core at once, and naps when they are long in coming."""
        pause = Pause()
        while (data := self.probe_bytes_of(peer, tag)) is None:
            pause()
        return data

    def pause(self) -> Pause:
        """Begin to wait for something that is looked for again and again."""
        return Pause()

    @translated
    def probe_bytes_of(self, peer: int, tag: int) -> bytes | None:
        """Take one waiting message of a rank and tag, or None at once."""
        status = MPI.Status()
        message = self._comm.Improbe(peer, tag, status)
        return None if message is None else _take(message, status)

    @translated
    def probe_bytes(self, tag: int) -> tuple[int, bytes] | None:
        """Take one waiting message of that tag from any living rank: (rank, bytes), or None at once."""
        status = MPI.Status()
        while True:
            try:
                message = self._comm.Improbe(MPI.ANY_SOURCE, tag, status)
                return None if message is None else (status.Get_source(), _take(message, status))
            except MPI.Exception as error:
                if error.Get_error_class() == MPI.ERR_REVOKED or rank_failure(error) is None:
                    raise
                self._comm.Ack_failed(self.size)  # from now on "any" means those that live

    @translated
    def split(self, color: int, key: int) -> MpiGroup:
        """Make the group of ranks with the same colour, ordered by key."""
        self._take_part("Barrier")  # Split has no non-blocking form: it begins when all are there
        return MpiGroup(self._comm.Split(color, key), self)

    @translated
    def duplicate(self) -> MpiGroup:
        """Make a group of the same ranks whose messages are apart. Collective."""
        self._take_part("Barrier")
        return MpiGroup(self._comm.Dup(), self)

    def failed(self) -> frozenset[int]:
        """Ranks that are known to have died, since the last message was looked for. Not collective, under a µs."""
        if not self.is_tolerant:
            return self._failed
        group = self._comm.Get_failed()
        if group.size != len(self._failed):
            self._failed = frozenset(MPI.Group.Translate_ranks(group, range(group.size), self._comm.group))
        return self._failed

    def revoke(self) -> None:
        """End all communication of this group, on every rank, for good. Not collective."""
        self._comm.Revoke()

    def agree(self, *, is_good: bool) -> bool:
        """Whether it is good on every rank, and none has died: one answer on all. Collective over those that live."""
        if not self.is_tolerant:
            return is_good
        try:
            return bool(self._comm.Agree(int(is_good)))
        except MPI.Exception as error:
            if rank_failure(error) is None:
                raise
            return False

    def shrink(self) -> MpiGroup:
        """Make the group of those that live, in the same order. Collective over them; works on a revoked group."""
        return MpiGroup(self._comm.Shrink(), self)

    def _take_part(self, verb: str, *args: object) -> None:
        """Take part in a collective. All ranks choose the same form: blocking ones do not meet non-blocking ones."""
        if self._may_block:
            getattr(self._comm, verb)(*args)
        else:
            MpiReceive(getattr(self._comm, f"I{verb.lower()}")(*args), args).wait()

    def _locations_of(self, comm: MPI.Comm) -> tuple[Location, ...] | None:
        """Locations of the ranks of a communicator that was made of this one."""
        if self.locations is None:
            return None
        ranks = MPI.Group.Translate_ranks(comm.group, range(comm.Get_size()), self._comm.group)
        return tuple(self.locations[rank] for rank in ranks)

    def abort(self, exit_code: int) -> None:
        """End every rank of the job, now."""
        if self.is_tolerant and len(self.failed()) == self.size - 1:
            os._exit(exit_code)  # the launcher of Open MPI 5.0 returns 0 when the last rank that lives aborts
        MPI.COMM_WORLD.Abort(exit_code)


def world_group() -> MpiGroup:
    """The group of all ranks, on a communicator of its own."""
    return MpiGroup(MPI.COMM_WORLD.Dup())


def _have_threads(comm: MPI.Comm) -> bool:
    """Whether several threads may call the MPI of each rank. Collective."""
    answer = bytearray([has_threads()])
    comm.Allreduce(MPI.IN_PLACE, [answer, MPI.BYTE], MPI.BAND)
    return bool(answer[0])


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *accumulate(counts)][:-1]


def _take(message: MPI.Message, status: MPI.Status) -> bytes:
    buffer = bytearray(status.Get_count(MPI.BYTE))
    message.Recv([buffer, MPI.BYTE])
    return bytes(buffer)
