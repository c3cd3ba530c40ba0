"""The group of one rank, without MPI: the engine and the tools run on it with no launcher."""

from collections import defaultdict, deque
from collections.abc import Sequence

import numpy as np

from hpcinfer.comm.protocol import Buffer, Messages, Pending
from hpcinfer.partition.topology import Location


class _Nothing:
    """No messages."""

    def start(self) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""

    def cancel(self) -> None:
        """Do nothing."""


class _Done:
    """A message that has already left."""

    def wait(self) -> None:
        """Return at once."""

    def test(self) -> bool:
        """Say that it is done."""
        return True

    def cancel(self) -> None:
        """Too late."""


class SerialGroup:
    """A group with one rank; a message to oneself waits in a queue by tag."""

    rank = 0
    size = 1
    is_tolerant = False
    locations: tuple[Location, ...] | None = (Location((), 0, 0),)

    def __init__(self) -> None:
        self._mail: dict[int, deque[bytes]] = defaultdict(deque)

    def barrier(self) -> None:
        """Return at once."""

    def broadcast_bytes(self, data: bytes | None, root: int = 0) -> bytes:
        """Return root's bytes, which are one's own."""
        assert data is not None, "root must give bytes"
        return data

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Return one's own bytes."""
        return [data]

    def all_gather(self, send: Buffer, receive: Buffer, counts: Sequence[int]) -> None:
        """Copy send to receive."""
        np.asarray(receive).reshape(-1)[:] = np.asarray(send).reshape(-1)

    def gather(self, send: Buffer, receive: Buffer | None, counts: Sequence[int], root: int = 0) -> None:
        """Copy send to receive."""
        assert receive is not None, "root must give a buffer"
        self.all_gather(send, receive, counts)

    def send(self, buffer: Buffer, peer: int, tag: int = 0) -> _Done:
        """Keep a copy for `receive`."""
        return self.send_bytes(np.asarray(buffer).tobytes(), peer, tag)

    def receive(self, buffer: Buffer, peer: int, tag: int = 0) -> None:
        """Take the oldest message of that tag."""
        flat = np.asarray(buffer).reshape(-1)
        flat[:] = np.frombuffer(self._mail[tag].popleft(), dtype=flat.dtype)

    def start_receive(self, buffer: Buffer, peer: int, tag: int = 0) -> _Done:
        """Take the oldest message of that tag, which must be there."""
        self.receive(buffer, peer, tag)
        return _Done()

    def wait_all(self, pending: Sequence[Pending]) -> None:
        """Return at once."""

    def prepare_exchange(self, outgoing: Messages, incoming: Messages, tag: int) -> _Nothing:
        """Nothing: there are no peers."""
        assert not outgoing and not incoming, f"{len(outgoing) = } {len(incoming) = }"
        return _Nothing()

    def send_bytes(self, data: bytes, peer: int, tag: int = 0) -> _Done:
        """Keep the bytes for `receive_bytes` or `probe_bytes`."""
        self._mail[tag].append(data)
        return _Done()

    def receive_bytes(self, peer: int, tag: int = 0) -> bytes:
        """Take the oldest message of that tag."""
        return self._mail[tag].popleft()

    def probe_bytes(self, tag: int) -> tuple[int, bytes] | None:
        """Take the oldest message of that tag, if there is one."""
        return (0, self._mail[tag].popleft()) if self._mail[tag] else None

    def failed(self) -> frozenset[int]:
        """Nobody."""
        return frozenset()

    def duplicate(self) -> "SerialGroup":
        """Make another group of one."""
        return SerialGroup()

    def revoke(self) -> None:
        """Nobody listens."""

    def agree(self, *, is_good: bool) -> bool:
        """Agree with oneself."""
        return is_good

    def shrink(self) -> "SerialGroup":
        """Make another group of one."""
        return SerialGroup()

    def split(self, color: int, key: int) -> "SerialGroup":
        """Make another group of one."""
        return SerialGroup()

    def abort(self, exit_code: int) -> None:
        """End the process."""
        raise SystemExit(exit_code)
