"""Arrays between GPUs through NCCL or RCCL: enqueued on the current stream, from and to where they stand.

A kernel of NCCL waits on the GPU for ranks that may have died. So nobody waits for a stream without looking after the
others (`check`): at a death, or an error of NCCL, the communicator is aborted, its kernels end, and so does the group.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from hpcinfer.comm.device.arrays import Array, DeviceArrays, Mark
from hpcinfer.comm.device.communicator import Communicator
from hpcinfer.comm.device.group import NCCL, DeviceGroup
from hpcinfer.comm.device.staged_group import StagedGroup
from hpcinfer.comm.protocol import Buffer, Collectives, Messages, Pending
from hpcinfer.errors import RankFailedError

# So many calls are enqueued between two marks, and so many marks may be ahead of the GPU: a driver lets about a
# thousand launches wait, and then blocks the thread, which could see no death any more.
_CALLS, _MARKS = 32, 2


class NcclGroup(DeviceGroup):
    """GPUs with a communicator between them.

    Args:
        group: of the MPI.
        arrays: of this rank's GPU.
        communicator: of the same ranks, in the same order.
        staged: the way through the MPI, for those who want to choose.
    """

    transport = NCCL

    def __init__(
        self, group: Collectives, arrays: DeviceArrays, communicator: Communicator, staged: StagedGroup
    ) -> None:
        super().__init__(group, arrays)
        self._communicator: Communicator | None = communicator
        self._staged = staged
        self._num_calls, self._marks = 0, list[Mark]()

    @property
    def transports(self) -> Mapping[str, DeviceGroup]:
        """Groups of the same ranks, by what moves arrays there."""
        return {self.transport: self, self._staged.transport: self._staged}

    @property
    def is_recordable(self) -> bool:
        """A graph may hold what is enqueued here."""
        return True

    def check(self) -> None:
        """Let the MPI work; at a death or an error of NCCL abort the communicator and raise. Not collective.

        Raises:
            RankFailedError: the group is of no use any more.
        """
        try:
            if error := self._open().async_error():
                raise RankFailedError(f"NCCL: {error}")
            self._staged.check()
        except RankFailedError:
            self.close()
            raise

    def close(self) -> None:
        """Abort the communicator: what is enqueued ends. Not collective; again does nothing."""
        self._staged.close()
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            abort(self.arrays, communicator)

    def all_gather(self, send: Buffer, receive: Buffer, counts: Sequence[int]) -> None:
        """Concatenate float32 buffers of `counts[rank]` elements into `receive`, by rank, on every rank."""
        if not self.arrays.owns(send) or len(set(counts)) > 1:
            return super().all_gather(send, receive, counts)
        source, target = self.arrays.address(send), self.arrays.address(receive)
        self.enqueue(lambda nccl, stream: nccl.all_gather(source, target, 4 * counts[0], stream))

    def all_reduce(self, array: Array) -> None:
        """Add float32 arrays of all ranks up in place, in whatever order NCCL takes. Collective over the group."""
        address, count = self.arrays.address(array), self.arrays.num_bytes(array) // 4
        self.enqueue(lambda nccl, stream: nccl.all_reduce(address, address, count, stream))

    def broadcast(self, buffer: Array, root: int = 0) -> None:
        """Give every rank what root's array holds. Collective over the group."""
        address, num_bytes = self.arrays.address(buffer), self.arrays.num_bytes(buffer)
        self.enqueue(lambda nccl, stream: nccl.broadcast(address, num_bytes, root, stream))

    def send(self, buffer: Buffer, peer: int, tag: int = 0) -> Pending:
        """Start sending a contiguous buffer; the receiver of one of the GPU must expect its size.

        The stream waits for the receiver's: ranks that all send before they receive wait for one another for ever.
        `prepare_exchange` is for those.
        """
        if not self.arrays.owns(buffer):
            return self.group.send(buffer, peer, tag)
        return self._start([(buffer, peer)], [])

    def start_receive(self, buffer: Buffer, peer: int, tag: int = 0) -> Pending:
        """Let a buffer come, of the size that is sent; what is enqueued next finds it."""
        if not self.arrays.owns(buffer):
            return self.group.start_receive(buffer, peer, tag)
        return self._start([], [(buffer, peer)])

    def enqueue(self, work: Callable[[Communicator, int], None]) -> None:
        """Call the communicator with the current stream; see that this rank does not run far ahead of its GPU.

        Raises:
            RankFailedError: a rank has died.
        """
        if self.arrays.is_recording():
            return work(self._open(), self.arrays.stream())
        if self._num_calls % _CALLS == 0:
            if len(self._marks) == _MARKS:
                self.arrays.wait(self.check, self._marks.pop(0))
            self._marks.append(self.arrays.mark())
        self._num_calls += 1
        communicator = self._open()
        try:
            work(communicator, self.arrays.stream())
        except Exception:
            self.check()  # an error because of a death is one of the group
            raise

    def _prepare(self, outgoing: Messages, incoming: Messages, tag: int) -> _Exchange:
        return _Exchange(self, outgoing, incoming)

    def _start(self, outgoing: Messages, incoming: Messages) -> _Enqueued:
        _Exchange(self, outgoing, incoming).start()
        return _Enqueued(self)

    def _open(self) -> Communicator:
        if self._communicator is None:
            raise RankFailedError("the communicator of this group was aborted")
        return self._communicator


def abort(arrays: DeviceArrays, communicator: Communicator) -> None:
    """End what is enqueued, and the communicator, without waiting for it. Not collective.

    Its memory is given back when the GPU is at rest: never, if another communicator of this rank hangs as well, and
    would be aborted only after this one. So each has a thread.
    """

    def run() -> None:
        arrays.bind()
        communicator.abort()

    threading.Thread(target=run, name="NCCL abort", daemon=True).start()


class _Enqueued:
    """A message of the stream."""

    def __init__(self, group: NcclGroup) -> None:
        self._group, self._mark = group, group.arrays.mark()

    def test(self) -> bool:
        return self._group.arrays.is_reached(self._mark)

    def wait(self) -> None:
        self._group.arrays.wait(self._group.check, self._mark)

    def cancel(self) -> None:
        """Nothing: it ends with the communicator."""


class _Exchange:
    """Messages as addresses: nothing here changes, so that a graph may hold them."""

    def __init__(self, group: NcclGroup, outgoing: Messages, incoming: Messages) -> None:
        self._group, self._held = group, (outgoing, incoming)
        self._outgoing, self._incoming = _addresses(group.arrays, outgoing), _addresses(group.arrays, incoming)

    def start(self) -> None:
        if self._outgoing or self._incoming:
            self._group.enqueue(self._enqueue)

    def finish(self) -> None:
        """Nothing: what is enqueued next comes after them."""

    def cancel(self) -> None:
        """Nothing: they end with the communicator."""

    def _enqueue(self, nccl: Communicator, stream: int) -> None:
        nccl.group_start()
        try:
            for address, num_bytes, peer in self._outgoing:
                nccl.send(address, num_bytes, peer, stream)
            for address, num_bytes, peer in self._incoming:
                nccl.receive(address, num_bytes, peer, stream)
        finally:
            nccl.group_end()


def _addresses(arrays: DeviceArrays, messages: Messages) -> list[tuple[int, int, int]]:
    """Address, bytes and rank of each message that is not empty."""
    found = [(arrays.address(array), arrays.num_bytes(array), peer) for array, peer in messages]
    return [each for each in found if each[1]]
