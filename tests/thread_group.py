"""Ranks as threads of one process, for tests of what only moves bytes; real MPI is in tests/mpi."""

import threading
from collections import defaultdict
from collections.abc import Callable
from queue import Queue
from typing import Any


class Sent:
    """A message that has left."""

    def wait(self) -> None:
        """Return at once."""


class ThreadGroup:
    """One rank of a group of threads."""

    def __init__(self, rank: int, board: list[bytes], meeting: threading.Barrier, mail: defaultdict[Any, Any]) -> None:
        self.rank, self.size, self._board, self._meeting, self._mail = rank, len(board), board, meeting, mail

    def barrier(self) -> None:
        """Wait for every rank."""
        self._meeting.wait(timeout=30)

    def send_bytes(self, data: bytes, peer: int, tag: int = 0) -> Sent:
        """Put bytes into the mail of a rank."""
        self._mail[self.rank, peer, tag].put(data)
        return Sent()

    def receive_bytes(self, peer: int, tag: int = 0) -> bytes:
        """Wait for bytes of a rank."""
        return self._mail[peer, self.rank, tag].get(timeout=30)

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


def run_ranks(size: int, work: Callable[[Any], Any]) -> list[Any]:
    """Call `work(group)` on every rank; returns what each rank returned or raised, by rank."""
    board, meeting, results = [b""] * size, threading.Barrier(size), [None] * size
    mail: defaultdict[Any, Any] = defaultdict(Queue)

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
