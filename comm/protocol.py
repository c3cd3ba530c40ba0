"""The `Collectives` protocol: what the rest of hpcinfer may ask of a group of ranks.

Lower-case names with `_bytes` move Python bytes (set-up, records); the others move contiguous buffers
(numpy arrays, or anything with the buffer or DLPack protocol) without copying them.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from hpcinfer.partition.topology import Location

Buffer = Any
Messages = Sequence[tuple[Buffer, int]]


class Pending(Protocol):
    """A message on its way."""

    def wait(self) -> None:
        """Return when the buffer may be used again."""

    def test(self) -> bool:
        """Whether the message has arrived or left."""

    def cancel(self) -> None:
        """Let a message that has not arrived come no more."""


class Exchange(Protocol):
    """Messages that are sent and received again and again."""

    def start(self) -> None:
        """Let all of them leave and come once more. Not collective, but the peers do the same, in the same order."""

    def finish(self) -> None:
        """Wait until all of them have left and come.

        Raises:
            RankFailedError: a rank has died.
        """

    def cancel(self) -> None:
        """Let what is under way come no more: a rank has died. Not collective."""


class Collectives(Protocol):
    """A group of ranks.

    All methods but send, receive, wait, probe, failed and abort are collective over the group."""

    rank: int
    size: int

    @property
    def locations(self) -> tuple[Location, ...] | None:
        """Where the ranks run, by rank; None if unknown (see hpcinfer.comm.topology)."""

    def barrier(self) -> None:
        """Wait until every rank is here."""

    def broadcast_bytes(self, data: bytes | None, root: int = 0) -> bytes:
        """Give every rank root's bytes."""

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Give every rank the bytes of all, by rank."""

    def all_gather(self, send: Buffer, receive: Buffer, counts: Sequence[int]) -> None:
        """Concatenate float32 buffers of `counts[rank]` elements into `receive`, by rank, on every rank."""

    def gather(self, send: Buffer, receive: Buffer | None, counts: Sequence[int], root: int = 0) -> None:
        """The same, on root only."""

    def send(self, buffer: Buffer, peer: int, tag: int = 0) -> Pending:
        """Start sending a contiguous buffer."""

    def receive(self, buffer: Buffer, peer: int, tag: int = 0) -> None:
        """Wait for a buffer of known size."""

    def start_receive(self, buffer: Buffer, peer: int, tag: int = 0) -> Pending:
        """Let a buffer of known size come; `wait_all` is how to wait for it."""

    def wait_all(self, pending: Sequence[Pending]) -> None:
        """Wait until all these messages have arrived or left.

        Raises:
            RankFailedError: a rank has died; receives are cancelled, so that nothing is written to their buffers.
        """

    def prepare_exchange(self, outgoing: Messages, incoming: Messages, tag: int) -> Exchange:
        """Prepare contiguous buffers that are sent and received again and again, as (buffer, peer).

        Not collective, but the peers do the same.
        """

    def send_bytes(self, data: bytes, peer: int, tag: int = 0) -> Pending:
        """Start sending bytes of any length."""

    def receive_bytes(self, peer: int, tag: int = 0) -> bytes:
        """Wait for bytes; yields the core while waiting."""

    def probe_bytes(self, tag: int) -> tuple[int, bytes] | None:
        """Take one waiting message of that tag from any rank: (rank, bytes), or None at once."""

    def failed(self) -> frozenset[int]:
        """Ranks that are known to have died; none where the MPI does not let the others go on."""

    def split(self, color: int, key: int) -> "Collectives":
        """Make the group of ranks with the same colour, ordered by key."""

    def abort(self, exit_code: int) -> None:
        """End every rank of the job, now."""


class World(Collectives, Protocol):
    """All ranks of a job, and what they can do when some of them have died (the verbs of ULFM).

    Where the MPI is not fault tolerant the launcher ends the job at the first death: nobody is ever lost here.
    """

    is_tolerant: bool
    locations: tuple[Location, ...] | None

    def duplicate(self) -> "World":
        """Make a group of the same ranks whose messages are apart. Collective."""

    def revoke(self) -> None:
        """End all communication of this group, on every rank, for good. Not collective."""

    def agree(self, *, is_good: bool) -> bool:
        """Whether it is good on every rank, and none has died: one answer on all. Collective over those that live."""

    def shrink(self) -> "World":
        """Make the group of those that live, in the same order. Collective over them; works on a revoked group."""
