"""Messages that were sent and have perhaps not left: their buffers must live until they have."""

from collections import deque

from hpcinfer.comm.protocol import Pending


class Outbox:
    """Keeps pending sends, in order, and lets go of those that have left."""

    def __init__(self) -> None:
        self._pending: deque[Pending] = deque()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is held."""
        return not self._pending

    def keep(self, pending: Pending) -> None:
        """Hold a send until it has left. Not collective."""
        self.turn()
        self._pending.append(pending)

    def turn(self) -> None:
        """Let go of those that have left; the MPI may use the moment to move the others on. Not collective."""
        while self._pending and self._pending[0].test():
            self._pending.popleft()

    def flush(self) -> None:
        """Wait until all have left. Not collective, but the receivers must receive."""
        while self._pending:
            self._pending.popleft().wait()
