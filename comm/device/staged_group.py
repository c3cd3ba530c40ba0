"""Arrays of GPUs through the MPI: by way of pinned memory, or straight from the GPU where the MPI takes its memory.

This is for GPUs that several ranks share, for where there is no NCCL, and for sizes at which the MPI is faster.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator

import numpy as np

from hpcinfer.comm.device.arrays import Array, DeviceArrays
from hpcinfer.comm.device.group import MPI, DeviceGroup
from hpcinfer.comm.device.pinned import PinnedMemory
from hpcinfer.comm.protocol import Buffer, Collectives, Messages, Pending
from hpcinfer.comm.waiting import Pause, work_meanwhile
from hpcinfer.errors import RankFailedError


class StagedGroup(DeviceGroup):
    """GPUs whose arrays travel through the MPI.

    Args:
        group: of the MPI.
        arrays: of this rank's GPU.
        is_direct: whether the MPI takes memory of GPUs; the same on all ranks (see `awareness`).
    """

    transport = MPI

    def __init__(self, group: Collectives, arrays: DeviceArrays, *, is_direct: bool = False) -> None:
        super().__init__(group, arrays)
        self.is_direct, self.pinned = is_direct, PinnedMemory(arrays)
        self._leaving: deque[_Send] = deque()

    def check(self) -> None:
        """Let messages leave, let the MPI work, and raise if a rank has died. Not collective.

        Raises:
            RankFailedError: one has.
        """
        self.turn()
        super().check()

    def close(self) -> None:
        """Let nothing leave any more. Not collective."""
        self._leaving.clear()

    def turn(self) -> bool:
        """Let arrays leave that are complete, in order; whether some are not. Not collective, does not wait."""
        try:
            while self._leaving and self.arrays.is_reached(self._leaving[0].mark):
                self._leaving.popleft().leave()
        except RankFailedError:  # whoever waits finds it, too
            self._leaving.clear()
        return bool(self._leaving)

    def send(self, buffer: Buffer, peer: int, tag: int = 0) -> Pending:
        """Start sending a contiguous buffer; one of the GPU leaves when it is complete, while this rank waits."""
        if not self.arrays.owns(buffer):
            return self.group.send(buffer, peer, tag)
        sent = _Send(self, self.arrays.flat(buffer), peer, tag)
        self._leaving.append(sent)
        if self.turn():
            work_meanwhile(self.turn)
        return sent

    def start_receive(self, buffer: Buffer, peer: int, tag: int = 0) -> Pending:
        """Let a buffer of known size come."""
        if not self.arrays.owns(buffer):
            return self.group.start_receive(buffer, peer, tag)
        if self.is_direct:
            self.arrays.wait(self.check)  # what is enqueued may still read what was there before
            return self.group.start_receive(self.arrays.flat(buffer), peer, tag)
        return _Receive(self, self.arrays.flat(buffer), peer, tag)

    def _prepare(self, outgoing: Messages, incoming: Messages, tag: int) -> _Exchange:
        return _Exchange(self, outgoing, incoming, tag)


class _Message(ABC):
    """An array that comes or goes."""

    def __init__(self, staged: StagedGroup) -> None:
        self._staged = staged

    @abstractmethod
    def test(self) -> bool: ...

    def wait(self) -> None:
        pause = Pause()
        while not self.test():
            self._staged.check()
            pause()


class _Send(_Message):
    """An array on its way: complete, then with the MPI, then gone."""

    def __init__(self, staged: StagedGroup, array: Array, peer: int, tag: int) -> None:
        super().__init__(staged)
        self._peer, self._tag = peer, tag
        self._buffer, self._block, self._sent = array, None, None  # type: Buffer, np.ndarray | None, Pending | None
        if not staged.is_direct:
            num_bytes = staged.arrays.num_bytes(array)
            self._block = staged.pinned.take(num_bytes)
            self._buffer = self._block[:num_bytes]
            staged.arrays.to_host(array, self._buffer)
        self.mark = staged.arrays.mark()

    def leave(self) -> None:
        self._sent = self._staged.group.send(self._buffer, self._peer, self._tag)

    def test(self) -> bool:
        self._staged.turn()
        if self._sent is None or not self._sent.test():
            return False
        if self._block is not None:
            self._staged.pinned.give(self._block, self.mark)
            self._block = None
        return True

    def cancel(self) -> None:
        """Let it leave: nobody writes to its buffer."""


class _Receive(_Message):
    """An array that comes into pinned memory, and is copied when it is there."""

    def __init__(self, staged: StagedGroup, array: Array, peer: int, tag: int) -> None:
        super().__init__(staged)
        self._array, self._is_there = array, False
        num_bytes = staged.arrays.num_bytes(array)
        self._block = staged.pinned.take(num_bytes)
        self._coming = staged.group.start_receive(self._block[:num_bytes], peer, tag)

    def test(self) -> bool:
        if not self._is_there and self._coming.test():
            arrays = self._staged.arrays
            arrays.to_device(self._block[: arrays.num_bytes(self._array)], self._array)
            self._staged.pinned.give(self._block, arrays.mark())
            self._is_there = True
        return self._is_there

    def cancel(self) -> None:
        if not self._is_there:
            self._coming.cancel()


class _Exchange:
    """Arrays that are sent and received again and again. The MPI has them from the end of the copies to `finish`."""

    def __init__(self, staged: StagedGroup, outgoing: Messages, incoming: Messages, tag: int) -> None:
        flat, self._staged, self._tag = staged.arrays.flat, staged, tag
        self._outgoing = [(flat(array), peer) for array, peer in outgoing]
        self._incoming = [(flat(array), peer) for array, peer in incoming]
        self._sizes = [sum(staged.arrays.num_bytes(array) for array, _ in each)
                       for each in (self._outgoing, self._incoming)]  # fmt: skip
        self._under_way: deque[tuple[np.ndarray | None, object]] = deque()  # blocks, and marks of the copies

    def start(self) -> None:
        arrays, block = self._staged.arrays, None
        if not self._staged.is_direct:
            block = self._staged.pinned.take(self._sizes[0])
            for (array, _), part in self._parts(block, self._outgoing):
                arrays.to_host(array, part)
        self._under_way.append((block, arrays.mark()))

    def finish(self) -> None:
        sent, mark = self._under_way.popleft()
        arrays, pinned = self._staged.arrays, self._staged.pinned
        arrays.wait(self._staged.check, mark)
        if sent is None:
            return self._exchange(self._outgoing, self._incoming)
        received = pinned.take(self._sizes[1])
        outgoing = [(part, peer) for (_, peer), part in self._parts(sent, self._outgoing)]
        incoming = list(self._parts(received, self._incoming))
        self._exchange(outgoing, [(part, peer) for (_, peer), part in incoming])
        for (array, _), part in incoming:
            arrays.to_device(part, array)
        pinned.give(sent, mark)
        pinned.give(received, arrays.mark())

    def cancel(self) -> None:
        self._under_way.clear()

    def _exchange(self, outgoing: Messages, incoming: Messages) -> None:
        group = self._staged.group
        pending = [group.start_receive(buffer, peer, self._tag) for buffer, peer in incoming]
        pending += [group.send(buffer, peer, self._tag) for buffer, peer in outgoing]
        group.wait_all(pending)

    def _parts(self, block: np.ndarray, messages: Messages) -> Iterator[tuple[tuple[Array, int], np.ndarray]]:
        """Each message and its part of a block."""
        start = 0
        for message in messages:
            stop = start + self._staged.arrays.num_bytes(message[0])
            yield message, block[start:stop]
            start = stop
