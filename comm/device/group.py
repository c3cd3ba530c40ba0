"""What groups of GPUs have in common: bytes travel through the MPI, arrays as each kind of group moves them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate

from hpcinfer.comm.device.arrays import Array, DeviceArrays
from hpcinfer.comm.node.patience import watch
from hpcinfer.comm.protocol import Buffer, Collectives, Exchange, Messages, Pending
from hpcinfer.partition.topology import Location
from hpcinfer.partition.tree_program import TreeProgram

NCCL, MPI = "nccl", "mpi"  # transports
_TAG = 5  # of collectives


class DeviceGroup(ABC):
    """A `Collectives` over a group of the MPI whose buffers may be arrays of a GPU; those of the host take the MPI.

    Work on arrays of a GPU is enqueued on its current stream: what is received is there for what is enqueued next.
    """

    transport: str

    def __init__(self, group: Collectives, arrays: DeviceArrays) -> None:
        self.group, self.arrays = group, arrays
        self.rank, self.size = group.rank, group.size
        self._look = watch(group)

    @property
    def locations(self) -> tuple[Location, ...] | None:
        """Where the ranks run, by rank; None if unknown."""
        return self.group.locations

    @property
    def transports(self) -> Mapping[str, DeviceGroup]:
        """Groups of the same ranks, by what moves arrays there."""
        return {self.transport: self}

    @property
    def is_recordable(self) -> bool:
        """Whether a graph may hold what is enqueued here."""
        return self.size == 1

    def check(self) -> None:
        """Let the MPI work, and raise if a rank has died: for all who wait for the GPU. Not collective.

        Raises:
            RankFailedError: one has.
        """
        self._look()

    @abstractmethod
    def close(self) -> None:
        """Give back what this rank holds: the group is over for it, as after a death. Not collective."""

    def barrier(self) -> None:
        """Wait until every rank is here; not for what is enqueued."""
        self.group.barrier()

    def broadcast_bytes(self, data: bytes | None, root: int = 0) -> bytes:
        """Give every rank root's bytes."""
        return self.group.broadcast_bytes(data, root)

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Give every rank the bytes of all, by rank."""
        return self.group.all_gather_bytes(data)

    def send_bytes(self, data: bytes, peer: int, tag: int = 0) -> Pending:
        """Start sending bytes of any length."""
        return self.group.send_bytes(data, peer, tag)

    def receive_bytes(self, peer: int, tag: int = 0) -> bytes:
        """Wait for bytes."""
        return self.group.receive_bytes(peer, tag)

    def probe_bytes(self, tag: int) -> tuple[int, bytes] | None:
        """Take one waiting message of that tag from any rank."""
        return self.group.probe_bytes(tag)

    def failed(self) -> frozenset[int]:
        """Ranks that are known to have died."""
        return self.group.failed()

    def split(self, color: int, key: int) -> Collectives:
        """Make the group of the MPI of ranks with the same colour, ordered by key."""
        return self.group.split(color, key)

    def abort(self, exit_code: int) -> None:
        """End every rank of the job, now."""
        self.group.abort(exit_code)

    def all_gather(self, send: Buffer, receive: Buffer, counts: Sequence[int]) -> None:
        """Concatenate float32 buffers of `counts[rank]` elements into `receive`, by rank, on every rank."""
        if not self.arrays.owns(send):
            return self.group.all_gather(send, receive, counts)
        parts, peers = self._parts(receive, counts), self._peers()
        self.arrays.copy(self.arrays.flat(send), parts[self.rank])
        self._move([(parts[self.rank], peer) for peer in peers], [(parts[peer], peer) for peer in peers])

    def gather(self, send: Buffer, receive: Buffer | None, counts: Sequence[int], root: int = 0) -> None:
        """The same, on root only."""
        if not self.arrays.owns(send):
            return self.group.gather(send, receive, counts, root)
        if self.rank != root:
            return self._move([(self.arrays.flat(send), root)], [])
        assert receive is not None, "root must give a buffer"
        parts = self._parts(receive, counts)
        self.arrays.copy(self.arrays.flat(send), parts[root])
        self._move([], [(parts[peer], peer) for peer in self._peers()])

    def broadcast(self, buffer: Array, root: int = 0) -> None:
        """Give every rank what root's array holds. Collective over the group."""
        whole = self.arrays.flat(buffer)
        if self.rank == root:
            self._move([(whole, peer) for peer in self._peers()], [])
        else:
            self._move([], [(whole, root)])

    def reduce_scatter(
        self, program: TreeProgram, nodes: Sequence[Array], out: Array, bounds: Sequence[int]
    ) -> None:
        """Finish the tree; each rank gets its own columns of the sum. As that of hpcinfer.comm.operations.

        Collective over the group.
        """
        columns = [slice(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]
        mine = columns[self.rank].stop - columns[self.rank].start
        flat = [self.arrays.flat(node) for node in nodes]
        brought = [[self.arrays.empty(mine) for _ in held] for held in program.nodes_by_rank]
        for node, place in zip(flat, brought[self.rank], strict=True):
            self.arrays.copy(node[columns[self.rank]], place)
        self._move([(node[columns[peer]], peer) for peer in self._peers() for node in flat],
                   [(array, peer) for peer in self._peers() for array in brought[peer]])  # fmt: skip
        self.arrays.evaluation(program, brought, [self.arrays.flat(out)])()

    def all_to_all(self, send: Array, receive: Array, counts: Sequence[Sequence[int]]) -> None:
        """Give each rank its part of every rank's array. As that of hpcinfer.comm.operations.

        Collective over the group.
        """
        outgoing = self._parts(send, counts[self.rank])
        incoming = self._parts(receive, [row[self.rank] for row in counts])
        self.arrays.copy(outgoing[self.rank], incoming[self.rank])
        self._move([(outgoing[peer], peer) for peer in self._peers()],
                   [(incoming[peer], peer) for peer in self._peers()])  # fmt: skip

    def receive(self, buffer: Buffer, peer: int, tag: int = 0) -> None:
        """Receive a buffer of known size; one of the GPU is there for what is enqueued next."""
        if self.arrays.owns(buffer):
            self._move([], [(self.arrays.flat(buffer), peer)], tag)
        else:
            self.group.receive(buffer, peer, tag)

    def wait_all(self, pending: Sequence[Pending]) -> None:
        """Wait until all these messages have arrived or left."""
        self.group.wait_all(pending)

    def prepare_exchange(self, outgoing: Messages, incoming: Messages, tag: int) -> Exchange:
        """Prepare buffers that are sent and received again and again, all of the GPU or all of the host."""
        if any(self.arrays.owns(buffer) for buffer, _ in (*outgoing, *incoming)):
            return self._prepare(outgoing, incoming, tag)
        return self.group.prepare_exchange(outgoing, incoming, tag)

    @abstractmethod
    def send(self, buffer: Buffer, peer: int, tag: int = 0) -> Pending:
        """Start sending a contiguous buffer; one of the GPU as soon as what is enqueued before is done."""

    @abstractmethod
    def start_receive(self, buffer: Buffer, peer: int, tag: int = 0) -> Pending:
        """Let a buffer of known size come."""

    @abstractmethod
    def _prepare(self, outgoing: Messages, incoming: Messages, tag: int) -> Exchange:
        """Prepare arrays of the GPU that are sent and received again and again."""

    def _move(self, outgoing: Messages, incoming: Messages, tag: int = _TAG) -> None:
        exchange = self._prepare(outgoing, incoming, tag)
        exchange.start()
        exchange.finish()

    def _peers(self) -> list[int]:
        """All others, each rank beginning with its successor."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def _parts(self, array: Array, counts: Sequence[int]) -> list[Array]:
        """Views of an array, one for each rank."""
        flat, ends = self.arrays.flat(array), list(accumulate(counts))
        return [flat[end - count : end] for end, count in zip(ends, counts, strict=True)]
