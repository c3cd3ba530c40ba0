"""Ranks as threads of one process, for tests of what only moves bytes; real MPI is in tests/mpi."""

import threading
from collections.abc import Callable, Sequence
from queue import Queue
from typing import Any

import numpy as np


class Sent:
    """A message that has left."""

    def wait(self) -> None:
        """Return at once."""


class ThreadGroup:
    """One rank of a group of threads."""

    def __init__(self, rank: int, board: list[bytes], meeting: threading.Barrier, mail: dict[Any, Any]) -> None:
        self.rank, self.size, self._board, self._meeting, self._mail = rank, len(board), board, meeting, mail

    def barrier(self) -> None:
        """Wait for every rank."""
        self._meeting.wait(timeout=30)

    def send_bytes(self, data: bytes, peer: int, tag: int = 0) -> Sent:
        """Put bytes into the mail of a rank."""
        self._mail[self.rank, peer].put((tag, data))
        return Sent()

    def receive_bytes(self, peer: int, tag: int = 0) -> bytes:
        """Wait for bytes of a rank; tags must come in the order in which they were sent."""
        sent_tag, data = self._mail[peer, self.rank].get(timeout=30)
        assert sent_tag == tag
        return data

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Give every rank the bytes of all, by rank."""
        self._board[self.rank] = data
        self._meeting.wait(timeout=30)
        gathered = list(self._board)
        self._meeting.wait(timeout=30)
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


def run_ranks(size: int, work: Callable[[Any], Any]) -> list[Any]:
    """Call `work(group)` on every rank; returns what each rank returned or raised, by rank."""
    board, meeting, results = [b""] * size, threading.Barrier(size), [None] * size
    mail: dict[Any, Any] = {(rank, peer): Queue() for rank in range(size) for peer in range(size)}

    def rank_main(rank: int) -> None:
        try:
            results[rank] = work(ThreadGroup(rank, board, meeting, mail))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
