"""`Collectives` over mpi4py. Importing this module starts MPI."""

import os
import time
from collections.abc import Sequence
from itertools import accumulate

from mpi4py import MPI

from hpcinfer.comm.protocol import Buffer

_SPIN_S = 0.002  # wait for bytes without sleeping this long, then in naps
_NAP_S = 0.0002


class MpiPending:
    """A non-blocking send; keeps its buffer alive until it has left."""

    def __init__(self, request: MPI.Request, buffer: object) -> None:
        self._request, self._buffer = request, buffer

    def wait(self) -> None:
        """Return when the buffer may be used again."""
        self._request.Wait()

    def test(self) -> bool:
        """Whether the message has left."""
        return bool(self._request.Test())


class MpiGroup:
    """Ranks that share a communicator. Buffers move with mpi4py's upper-case methods: nothing is pickled."""

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self._comm.Barrier()

    def broadcast_bytes(self, data: bytes | None, root: int = 0) -> bytes:
        """Give every rank root's bytes."""
        length, own = bytearray(8), data if self.rank == root else None
        if self.rank == root:
            assert own is not None, "root must give bytes"
            length[:] = len(own).to_bytes(8, "little")
        self._comm.Bcast([length, MPI.BYTE], root)
        buffer = bytearray(int.from_bytes(length, "little") if own is None else own)
        self._comm.Bcast([buffer, MPI.BYTE], root)
        return bytes(buffer)

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Give every rank the bytes of all, by rank."""
        lengths = bytearray(8 * self.size)
        self._comm.Allgather([len(data).to_bytes(8, "little"), MPI.BYTE], [lengths, MPI.BYTE])
        counts = [int.from_bytes(lengths[8 * r : 8 * r + 8], "little") for r in range(self.size)]
        starts = [0, *accumulate(counts)]
        buffer = bytearray(starts[-1])
        self._comm.Allgatherv([data, MPI.BYTE], [buffer, counts, starts[:-1], MPI.BYTE])
        return [bytes(buffer[starts[r] : starts[r + 1]]) for r in range(self.size)]

    def all_gather(self, send: Buffer, receive: Buffer, counts: Sequence[int]) -> None:
        """Concatenate float32 buffers of `counts[rank]` elements into `receive`, by rank, on every rank."""
        self._comm.Allgatherv([send, counts[self.rank], MPI.FLOAT], [receive, counts, _starts(counts), MPI.FLOAT])

    def gather(self, send: Buffer, receive: Buffer | None, counts: Sequence[int], root: int = 0) -> None:
        """Concatenate float32 buffers of `counts[rank]` elements into root's `receive`."""
        into = [receive, counts, _starts(counts), MPI.FLOAT] if self.rank == root else None
        self._comm.Gatherv([send, counts[self.rank], MPI.FLOAT], into, root)

    def send(self, buffer: Buffer, peer: int, tag: int = 0) -> MpiPending:
        """Start sending a contiguous buffer."""
        return MpiPending(self._comm.Isend(buffer, peer, tag), buffer)

    def receive(self, buffer: Buffer, peer: int, tag: int = 0) -> None:
        """Wait for a buffer of known size."""
        self._comm.Recv(buffer, peer, tag)

    def send_bytes(self, data: bytes, peer: int, tag: int = 0) -> MpiPending:
        """Start sending bytes of any length."""
        return MpiPending(self._comm.Isend([data, MPI.BYTE], peer, tag), data)

    def receive_bytes(self, peer: int, tag: int = 0) -> bytes:
        """Wait for bytes; yields the core at once, and naps when they are long in coming."""
        status, start = MPI.Status(), time.monotonic()
        while (message := self._comm.Improbe(peer, tag, status)) is None:
            if time.monotonic() - start < _SPIN_S:
                os.sched_yield()
            else:
                time.sleep(_NAP_S)
        return _take(message, status)

    def probe_bytes(self, tag: int) -> tuple[int, bytes] | None:
        """Take one waiting message of that tag from any rank: (rank, bytes), or None at once."""
        status = MPI.Status()
        message = self._comm.Improbe(MPI.ANY_SOURCE, tag, status)
        return None if message is None else (status.Get_source(), _take(message, status))

    def split(self, color: int, key: int) -> "MpiGroup":
        """Make the group of ranks with the same colour, ordered by key."""
        return MpiGroup(self._comm.Split(color, key))

    def abort(self, exit_code: int) -> None:
        """End every rank of the job, now."""
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
