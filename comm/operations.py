"""Collectives and messages of a group, each through the memory that ranks of a node share or through the MPI.

Which of the two, the selector says for each operation and size, alike on all ranks; what is moved is the same. Sums of
all ranks on all ranks have forms of their own (hpcinfer.comm.tree).

Through memory in a group over several nodes: broadcasts and all-gathers go from one rank of a node to one of another,
and in memory inside of each; messages take it if both ranks are on one node. The rest needs one node for all.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from time import monotonic

import numpy as np

from hpcinfer.comm.node.channel import NodeChannel
from hpcinfer.comm.node.library import evaluate
from hpcinfer.comm.protocol import Buffer, Collectives, Pending
from hpcinfer.comm.selector import NODE, Selector
from hpcinfer.partition.topology import by_node
from hpcinfer.partition.tree_program import TreeProgram

_TAG = 3  # of the messages of these collectives; forms.py has the ones below
_IDLE_S = 0.02  # who waits for a message longer than this is idle
_FEW_BYTES = 1024  # as which messages count whose receiver does not know their length
_HERE, _ELSEWHERE = b"\0", b"\1"  # before bytes through memory: that they follow, or come through the MPI


class Operations:
    """What a group does together, through memory where that is faster. Used by one thread at a time.

    Args:
        group: all ranks; `group` is for what is not here.
        channel: between those of this node, in the order of the group; None where they share no memory.
        selector: the same on all ranks.
    """

    def __init__(
        self, group: Collectives, channel: NodeChannel | None = None, selector: Selector | None = None
    ) -> None:
        self.group, self.rank, self.size, self.channel = group, group.rank, group.size, channel
        where = group.locations if channel is not None else None
        self._nodes: list[tuple[int, ...]] = by_node(where) if where else [(rank,) for rank in range(group.size)]
        self._here = next(node for node in self._nodes if group.rank in node)
        self._is_one_node = len(self._here) == group.size
        self._way_of = (selector or Selector()).way_chooser(group.locations, group.size)

    def all_gather(self, send: Buffer, receive: Buffer, counts: Sequence[int]) -> None:
        """Concatenate float32 buffers of `counts[rank]` elements into `receive`, by rank, on every rank.

        Collective over the group.
        """
        if self.channel is None or self._way_of("all_gather", 4 * sum(counts)) != NODE:
            self.group.all_gather(send, receive, counts)
        elif self._is_one_node:
            self.channel.all_gather(send, receive, counts)
        else:
            self._all_gather_by_node(self.channel, send, receive, counts)

    def gather(self, send: Buffer, receive: Buffer | None, counts: Sequence[int], root: int = 0) -> None:
        """The same, on root only. Collective over the group."""
        if self.channel is not None and self._is_one_node and self._way_of("gather", 4 * sum(counts)) == NODE:
            self.channel.gather(send, receive, counts, root)
        else:
            self.group.gather(send, receive, counts, root)

    def broadcast(self, buffer: Buffer, root: int = 0) -> None:
        """Give every rank what root's buffer holds: contiguous, of one size. Collective over the group."""
        channel = self.channel
        if channel is None or self._way_of("broadcast", np.asarray(buffer).nbytes) != NODE:
            return self._send_to_all(buffer, root, range(self.size))
        heads = [root if root in node else node[0] for node in self._nodes]
        if self.rank in heads:
            self._send_to_all(buffer, root, heads)
        head = next(rank for rank in self._here if rank in heads)
        channel.broadcast(buffer, self._here.index(head))

    def reduce_scatter(
        self, program: TreeProgram, nodes: Sequence[Buffer], out: Buffer, bounds: Sequence[int]
    ) -> None:
        """Finish the tree; each rank gets its own columns of the sum.

        Collective over the group.

        Args:
            program: of all nodes that the ranks hold, which together are one node of the tree.
            nodes: contiguous float32 arrays of one size, those of this rank.
            out: for columns [bounds[rank], bounds[rank + 1]) of the sum.
            bounds: where each rank's columns begin; the last one is where all end.
        """
        if self.channel is not None and self._is_one_node and self._way_of("reduce_scatter", 4 * bounds[-1]) == NODE:
            return self.channel.reduce_scatter(program, nodes, out, bounds)
        lengths, held = np.diff(bounds).tolist(), [len(each) for each in program.nodes_by_rank]
        flat = [np.asarray(node).reshape(-1) for node in nodes]
        mine = [node[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False) for node in flat]
        brought = np.empty(sum(held) * lengths[self.rank], np.float32)
        self._exchange(np.concatenate(mine), brought, [[count * length for length in lengths] for count in held])
        rows = iter(brought.reshape(sum(held), lengths[self.rank]))
        evaluate(program, [[next(rows) for _ in range(count)] for count in held], [np.asarray(out).reshape(-1)])

    def all_to_all(self, send: Buffer, receive: Buffer, counts: Sequence[Sequence[int]]) -> None:
        """Give each rank its part of every rank's buffer, in the order of the senders.

        Collective over the group.

        Args:
            send: contiguous float32, a part for each rank.
            receive: contiguous float32, a part from each rank.
            counts: elements from rank i to rank j are counts[i][j], the same table on all.
        """
        num_bytes = 4 * sum(map(sum, counts)) // self.size
        if self.channel is not None and self._is_one_node and self._way_of("all_to_all", num_bytes) == NODE:
            self.channel.all_to_all(send, receive, counts)
        else:
            self._exchange(send, receive, counts)

    def is_near(self, peer: int, num_bytes: int) -> bool:
        """Whether a message of this size to or from a rank goes through memory, where it leaves at once.

        Not collective.
        """
        return (self.channel is not None and peer in self._here and 2 * num_bytes <= self.channel.ring_bytes
                and self._way_of("send", num_bytes) == NODE)  # fmt: skip

    def send(self, buffer: Buffer, peer: int, tag: int = 0) -> Pending:
        """Start sending a contiguous buffer. Not collective."""
        if self.channel is None or not self.is_near(peer, np.asarray(buffer).nbytes):
            return self.group.send(buffer, peer, tag)
        sent = self.channel.send(buffer, self._here.index(peer), tag)
        sent.wait()  # leaves at once, unless the receiver is far behind
        return sent

    def receive(self, buffer: Buffer, peer: int, tag: int = 0) -> None:
        """Wait for a buffer of known size. Not collective."""
        if self.channel is None or not self.is_near(peer, np.asarray(buffer).nbytes):
            self.group.wait_all([self.group.start_receive(buffer, peer, tag)])
        else:
            self.channel.receive(buffer, self._here.index(peer), tag)

    def send_bytes(self, data: bytes, peer: int, tag: int = 0) -> Pending:
        """Start sending bytes of any length. Not collective."""
        if self.channel is None or not self.is_near(peer, _FEW_BYTES):
            return self.group.send_bytes(data, peer, tag)
        is_short = 2 * len(data) <= self.channel.ring_bytes
        sent = self.channel.send(_HERE + data if is_short else _ELSEWHERE, self._here.index(peer), tag)
        sent.wait()
        return sent if is_short else self.group.send_bytes(data, peer, tag)

    def receive_bytes(self, peer: int, tag: int = 0) -> bytes:
        """Wait for bytes. Not collective."""
        if self.channel is None or not self.is_near(peer, _FEW_BYTES):
            return self.group.receive_bytes(peer, tag)
        with self._idling(self.channel):
            data = self.channel.receive_bytes(self._here.index(peer), tag)
        return data[1:] if data[:1] == _HERE else self.group.receive_bytes(peer, tag)

    def watch(self, is_mpi_busy: Callable[[], bool]) -> None:
        """Look after the MPI more often, while a rank waits in memory, as long as this says so. Not collective."""
        if self.channel is not None:
            self.channel.is_mpi_busy = is_mpi_busy

    def close(self) -> None:
        """Give the shared memory back: it is over for this rank, as after a death. Not collective."""
        if self.channel is not None:
            self.channel.close()

    @contextmanager
    def _idling(self, channel: NodeChannel) -> Iterator[None]:
        """Let the group do what it does while a rank waits for bytes for long."""
        while_idle: Callable[[], bool | None] | None = getattr(self.group, "while_idle", None)
        start = monotonic()
        if while_idle is not None:
            channel.while_waiting = lambda: while_idle() if monotonic() - start > _IDLE_S else None
        try:
            yield
        finally:
            channel.while_waiting = None

    def _all_gather_by_node(
        self, channel: NodeChannel, send: Buffer, receive: Buffer, counts: Sequence[int]
    ) -> None:
        """Gather in each node, exchange what nodes have between their first ranks, and tell the node."""
        sizes = [sum(counts[rank] for rank in node) for node in self._nodes]
        starts = [0, *accumulate(sizes)]
        whole = np.empty(starts[-1], np.float32)
        parts = [whole[start:stop] for start, stop in zip(starts, starts[1:], strict=False)]
        own = self._nodes.index(self._here)
        channel.all_gather(send, parts[own], [counts[rank] for rank in self._here])
        if self.rank == self._here[0]:
            others = [(node[0], part) for node, part in zip(self._nodes, parts, strict=True) if node != self._here]
            pending: list[Pending] = [self.group.start_receive(part, peer, _TAG) for peer, part in others]
            pending += [self.group.send(parts[own], peer, _TAG) for peer, _ in others]
            self.group.wait_all(pending)
        channel.broadcast(whole, 0)
        _place(whole, [rank for node in self._nodes for rank in node], receive, counts)

    def _send_to_all(self, buffer: Buffer, root: int, ranks: Sequence[int]) -> None:
        """Root sends to each of some ranks."""
        if self.rank != root:
            return self.group.wait_all([self.group.start_receive(buffer, root, _TAG)])
        self.group.wait_all([self.group.send(buffer, rank, _TAG) for rank in ranks if rank != root])

    def _exchange(self, send: Buffer, receive: Buffer, counts: Sequence[Sequence[int]]) -> None:
        """An all-to-all of messages, each rank beginning with its successor."""
        outgoing = _parts(send, counts[self.rank])
        incoming = _parts(receive, [row[self.rank] for row in counts])
        incoming[self.rank][:] = outgoing[self.rank]
        peers = [(self.rank + step) % self.size for step in range(1, self.size)]
        pending: list[Pending] = [self.group.start_receive(incoming[peer], peer, _TAG) for peer in peers]
        pending += [self.group.send(outgoing[peer], peer, _TAG) for peer in peers]
        self.group.wait_all(pending)


def _parts(buffer: Buffer, counts: Sequence[int]) -> list[np.ndarray]:
    """Views of a buffer, one for each rank."""
    flat, ends = np.asarray(buffer).reshape(-1), list(accumulate(counts))
    return [flat[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _place(whole: np.ndarray, order: Sequence[int], receive: Buffer, counts: Sequence[int]) -> None:
    """Copy parts that stand in some order of the ranks to their places by rank."""
    into = _parts(receive, counts)
    for rank, part in zip(order, _parts(whole, [counts[rank] for rank in order]), strict=True):
        into[rank][:] = part
