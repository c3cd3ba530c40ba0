"""`Collectives` over mpi4py. Importing this module starts MPI.

With a fault-tolerant MPI a dead rank raises `RankFailedError` in those that wait for it; the verbs revoke, agree and
shrink are ULFM's. Without one the launcher ends the job, and none of that happens.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import ParamSpec, TypeVar

from mpi4py import MPI

from hpcinfer.comm.library import has_threads, is_fault_tolerant
from hpcinfer.comm.protocol import Buffer, Messages, Pending
from hpcinfer.comm.waiting import Pause, wait_for
from hpcinfer.errors import RankFailedError, RevokedError
from hpcinfer.partition.topology import Location

P = ParamSpec("P")
T = TypeVar("T")


def rank_failure(error: MPI.Exception) -> RankFailedError | None:
    """Turn the MPI's word for a dead rank into ours; None for all other errors."""
    kind = error.Get_error_class()
    if kind == MPI.ERR_REVOKED:
        return RevokedError("the group has been revoked")
    return RankFailedError("a rank has died") if kind in (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING) else None


def _translated(method: Callable[P, T]) -> Callable[P, T]:
    """Raise our errors where a rank has died."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except MPI.Exception as error:
            raise rank_failure(error) or error from None

    return call


_UNFINISHED: deque[tuple[MPI.Request, object]] = deque()  # given up, or of dead groups: MPI may touch their buffers


def _prune() -> None:
    """Let go of the buffers that MPI is done with. What is looked at is nobody else's meanwhile."""
    for _ in range(len(_UNFINISHED)):
        with suppress(IndexError):  # another thread has taken it
            request, buffer = _UNFINISHED.popleft()
            if not _is_over(request):
                _UNFINISHED.append((request, buffer))


def _is_over(request: MPI.Request) -> bool:
    try:
        return bool(request.Test())
    except MPI.Exception as error:
        return rank_failure(error) is not None


class _Pending:
    """A non-blocking message; its buffer lives until MPI is done with it."""

    def __init__(self, request: MPI.Request, buffer: object) -> None:
        self._request, self._buffer = request, buffer

    def __del__(self) -> None:
        if self._request:
            _UNFINISHED.append((self._request, self._buffer))


class MpiReceive(_Pending):
    """A message that is to come."""

    @_translated
    def test(self) -> bool:
        """Whether it is there."""
        return bool(self._request.Test())

    def cancel(self) -> None:
        """Let it come no more."""
        if self._request:
            self._request.Cancel()

    def wait(self) -> None:
        """Return when it is there."""
        pause = Pause()
        while not self.test():
            pause()


class MpiPending(_Pending):
    """A non-blocking send. To a dead rank it has left."""

    def cancel(self) -> None:
        """Let it leave: nobody writes to its buffer."""

    def wait(self) -> None:
        """Return when the buffer may be used again."""
        pause = Pause()
        while not self.test():
            pause()

    def test(self) -> bool:
        """Whether the message has left."""
        try:
            return bool(self._request.Test())
        except MPI.Exception as error:
            if rank_failure(error) is None:
                raise
            return True


class MpiExchange:
    """Messages that are sent and received again and again; their buffers live as long as this."""

    def __init__(self, requests: list[MPI.Prequest], buffers: object) -> None:
        self._requests, self._buffers = requests, buffers

    @_translated
    def start(self) -> None:
        """Let all of them leave and come once more."""
        MPI.Prequest.Startall(self._requests)

    @_translated
    def finish(self) -> None:
        """Wait until all of them have left and come."""
        pause = Pause()
        while not MPI.Request.Testall(self._requests):
            pause()

    def __del__(self) -> None:
        if not MPI.Is_finalized():
            for request in self._requests:
                request.Free()


class MpiGroup:
    """Ranks that share a communicator. Buffers move with mpi4py's upper-case methods: nothing is pickled."""

    def __init__(self, comm: MPI.Comm, parent: MpiGroup | None = None) -> None:
        self._comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.locations = None if parent is None else parent._locations_of(comm)
        self.is_tolerant = is_fault_tolerant()
        self._has_threads = has_threads()
        self._failed: frozenset[int] = frozenset()

    @_translated
    def barrier(self) -> None:
        """Wait until every rank is here."""
        self._take_part("Barrier")

    @_translated
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

    @_translated
    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Give every rank the bytes of all, by rank."""
        lengths = bytearray(8 * self.size)
        self._take_part("Allgather", [len(data).to_bytes(8, "little"), MPI.BYTE], [lengths, MPI.BYTE])
        counts = [int.from_bytes(lengths[8 * r : 8 * r + 8], "little") for r in range(self.size)]
        starts = [0, *accumulate(counts)]
        buffer = bytearray(starts[-1])
        self._take_part("Allgatherv", [data, MPI.BYTE], [buffer, counts, starts[:-1], MPI.BYTE])
        return [bytes(buffer[starts[r] : starts[r + 1]]) for r in range(self.size)]

    @_translated
    def all_gather(self, send: Buffer, receive: Buffer, counts: Sequence[int]) -> None:
        """Concatenate float32 buffers of `counts[rank]` elements into `receive`, by rank, on every rank."""
        whole = [receive, counts, _starts(counts), MPI.FLOAT]
        self._take_part("Allgatherv", [send, counts[self.rank], MPI.FLOAT], whole)

    @_translated
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

    @_translated
    def receive(self, buffer: Buffer, peer: int, tag: int = 0) -> None:
        """Wait for a buffer of known size."""
        if self._has_threads:
            self._comm.Recv(buffer, peer, tag)
        else:
            self.start_receive(buffer, peer, tag).wait()

    @_translated
    def start_receive(self, buffer: Buffer, peer: int, tag: int = 0) -> MpiReceive:
        """Let a buffer of known size come."""
        if _UNFINISHED:
            _prune()
        return MpiReceive(self._comm.Irecv(buffer, peer, tag), buffer)

    def wait_all(self, pending: Sequence[Pending]) -> None:
        """Wait until all these messages have arrived or left."""
        wait_for(pending, Pause(), lambda: None)

    @_translated
    def prepare_exchange(self, outgoing: Messages, incoming: Messages, tag: int) -> MpiExchange:
        """Prepare buffers that are sent and received again and again: the MPI is told once what they are."""
        requests = [self._comm.Recv_init(buffer, peer, tag) for buffer, peer in incoming]
        requests += [self._comm.Send_init(buffer, peer, tag) for buffer, peer in outgoing]
        return MpiExchange(requests, (outgoing, incoming))

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

    @_translated
    def probe_bytes_of(self, peer: int, tag: int) -> bytes | None:
        """Take one waiting message of a rank and tag, or None at once."""
        status = MPI.Status()
        message = self._comm.Improbe(peer, tag, status)
        return None if message is None else _take(message, status)

    @_translated
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

    @_translated
    def split(self, color: int, key: int) -> MpiGroup:
        """Make the group of ranks with the same colour, ordered by key."""
        return MpiGroup(self._comm.Split(color, key), self)

    @_translated
    def duplicate(self) -> MpiGroup:
        """Make a group of the same ranks whose messages are apart. Collective."""
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
        """Take part in a collective; where one thread sees to all messages, to those of others meanwhile, too."""
        if self._has_threads:
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


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *accumulate(counts)][:-1]


def _take(message: MPI.Message, status: MPI.Status) -> bytes:
    buffer = bytearray(status.Get_count(MPI.BYTE))
    message.Recv([buffer, MPI.BYTE])
    return bytes(buffer)
