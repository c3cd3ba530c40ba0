"""Ranks as threads of one process, for tests of what only moves bytes; real MPI is in tests/comm/test_mpi.py."""

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from queue import Empty, Queue
from typing import Any

import numpy as np

from hpcinfer.comm.exchange import RepeatedMessages
from hpcinfer.comm.waiting import turn_meanwhile

_LIMIT_S = 30  # a thread waits no longer for the others


class Sent:
    """A message that has left."""

    def wait(self) -> None:
        """Return at once."""

    def test(self) -> bool:
        """Say that it has left."""
        return True

    def cancel(self) -> None:
        """Too late."""


class Coming:
    """A message that may come."""

    def __init__(self, mail: "Queue[bytes]", buffer: Any) -> None:
        self._mail, self._flat = mail, np.asarray(buffer).reshape(-1)
        self._is_done = False

    def test(self) -> bool:
        """Take it, if it is there."""
        return self._take(block=False)

    def wait(self) -> None:
        """Wait for it."""
        self._take(block=True)

    def cancel(self) -> None:
        """Let it not come."""
        self._is_done = True

    def _take(self, *, block: bool) -> bool:
        if not self._is_done:
            try:
                found = np.frombuffer(self._mail.get(block, _LIMIT_S), self._flat.dtype)
            except Empty:
                if block:
                    raise
                return False
            self._flat[: len(found)] = found
            self._is_done = True
        return True


class _Shared:
    """What the threads of a group have in common."""

    def __init__(self, size: int) -> None:
        self.board, self.meeting = [b""] * size, threading.Barrier(size)
        self.mail: dict[Any, Queue[bytes]] = {}  # by sender, receiver and tag
        self.parts: dict[Any, _Shared] = {}  # by number of the split and colour


class ThreadGroup:
    """One rank of a group of threads."""

    def __init__(self, rank: int, shared: _Shared) -> None:
        self.rank, self.size = rank, len(shared.board)
        self.locations: Any = None
        self._shared, self._num_splits = shared, 0

    def barrier(self) -> None:
        """Wait for every rank."""
        self._shared.meeting.wait(_LIMIT_S)

    def send_bytes(self, data: bytes, peer: int, tag: int = 0) -> Sent:
        """Put bytes into the mail of a rank."""
        self._mail(self.rank, peer, tag).put(data)
        return Sent()

    def receive_bytes(self, peer: int, tag: int = 0) -> bytes:
        """Wait for bytes of a rank."""
        return self._mail(peer, self.rank, tag).get(timeout=_LIMIT_S)

    def send(self, buffer: Any, peer: int, tag: int = 0) -> Sent:
        """Put a copy of a buffer into the mail of a rank."""
        return self.send_bytes(np.ascontiguousarray(buffer).tobytes(), peer, tag)

    def receive(self, buffer: Any, peer: int, tag: int = 0) -> None:
        """Wait for a buffer of a rank."""
        flat = np.asarray(buffer).reshape(-1)
        flat[:] = np.frombuffer(self.receive_bytes(peer, tag), flat.dtype)

    def start_receive(self, buffer: Any, peer: int, tag: int = 0) -> Coming:
        """Let a buffer of a rank come."""
        return Coming(self._mail(peer, self.rank, tag), buffer)

    def wait_all(self, pending: Sequence[Any]) -> None:
        """Wait for messages, and do what goes on meanwhile."""
        end = time.monotonic() + _LIMIT_S
        for each in pending:
            while not each.test():
                turn_meanwhile()
                time.sleep(0.0001)
                if time.monotonic() > end:
                    raise Empty

    def prepare_exchange(self, outgoing: Any, incoming: Any, tag: int) -> RepeatedMessages:
        """Send and receive these buffers again and again."""
        return RepeatedMessages(self, outgoing, incoming, tag)

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Give every rank the bytes of all, by rank."""
        self._shared.board[self.rank] = data
        self.barrier()
        gathered = list(self._shared.board)
        self.barrier()
        return gathered

    def broadcast_bytes(self, data: bytes | None, root: int = 0) -> bytes:
        """Give every rank root's bytes."""
        return self.all_gather_bytes(data or b"")[root]

    def all_gather(self, send: Any, receive: Any, counts: Sequence[int]) -> None:
        """Concatenate float32 buffers into `receive`, by rank."""
        parts = self.all_gather_bytes(np.ascontiguousarray(send).tobytes())
        assert [len(part) for part in parts] == [4 * count for count in counts]
        np.asarray(receive).reshape(-1)[:] = np.frombuffer(b"".join(parts), np.float32)

    def gather(self, send: Any, receive: Any, counts: Sequence[int], root: int = 0) -> None:
        """The same, on root only."""
        self.all_gather(send, receive if self.rank == root else np.empty(sum(counts), np.float32), counts)

    def failed(self) -> frozenset[int]:
        """Threads do not die."""
        return frozenset()

    def probe_bytes(self, tag: int) -> None:
        """Nothing has come: these are for messages whose sender is known."""

    def split(self, color: int, key: int) -> "ThreadGroup":
        """Make the group of ranks with the same colour, ordered by key."""
        self._num_splits += 1
        wishes = [tuple(map(int, wish.split())) for wish in self.all_gather_bytes(b"%d %d" % (color, key))]
        members = sorted((key, rank) for rank, (wanted, key) in enumerate(wishes) if wanted == color)
        part = self._shared.parts.setdefault((self._num_splits, color), _Shared(len(members)))
        return ThreadGroup(members.index((key, self.rank)), part)

    def _mail(self, sender: int, receiver: int, tag: int) -> "Queue[bytes]":
        return self._shared.mail.setdefault((sender, receiver, tag), Queue())


def run_ranks(size: int, work: Callable[[Any], Any]) -> list[Any]:
    """Call `work(group)` on every rank; returns what each rank returned or raised, by rank."""
    shared, results = _Shared(size), [None] * size

    def rank_main(rank: int) -> None:
        try:
            results[rank] = work(ThreadGroup(rank, shared))
        except Exception as error:
            traceback.print_exc()  # seen where the others then wait for this rank in vain
            results[rank] = error

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
