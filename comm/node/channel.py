"""Collectives and messages between the ranks of one node, through shared memory.

Sums are plain float32 additions in the order of the tree, with the same bits in every form. Who waits looks between
slices of time whether a rank has died, and raises RankFailedError then: the channel is of no use any more, and the
survivors open another one.
"""

from __future__ import annotations

import functools
import json
import math
import mmap
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from hpcinfer.comm.launcher import read_launch
from hpcinfer.comm.node.library import Compiled, Library, compile_program, load
from hpcinfer.comm.node.mail import Incoming, Mail, Outgoing
from hpcinfer.comm.node.patience import own_cpus, patience_for, watch
from hpcinfer.comm.node.region import FOLDER, Geometry, open_region, possible_geometries
from hpcinfer.comm.protocol import Buffer, Collectives
from hpcinfer.comm.waiting import is_working_meanwhile, turn_meanwhile
from hpcinfer.errors import RankFailedError
from hpcinfer.partition.tree_program import TreeProgram

SLOT_BYTES = 1 << 20
_FIRST_SLICE_NS = 300_000
_MAX_NODES = 128  # of a rank in a reduction: twice the levels of the tree at most
_ALL = -1  # for a root: everyone gets everything


class NodeChannel:
    """One rank's way to the others of its node. Made by `open`; used by one thread at a time.

    `rank` and `size` count the members. Memory of a rank: two slots and two rooms, and rings of 2 MiB or less.
    """

    def __init__(
        self, library: Library, region: tuple[mmap.mmap, Geometry], rank: int, patience: tuple[int, int],
        check: Callable[[], None],
    ) -> None:  # fmt: skip
        self._ffi, self._lib, self._library = library.ffi, library.lib, library
        memory, geometry = region
        self._geometry, self._check = geometry, check
        self._base: Any = self._ffi.from_buffer("char[]", memory, require_writable=True)
        struct = self._ffi.new("hpc_geometry *", geometry.as_struct())
        made = self._lib.hpc_channel_new(self._base, struct, rank, patience)
        if made == self._ffi.NULL:
            raise MemoryError("no memory for a channel between ranks of a node")
        self._channel: Any = self._ffi.gc(made, self._lib.hpc_channel_free)
        self.rank, self.size, self.room_bytes = rank, geometry.size, geometry.room_bytes
        self.ring_bytes = geometry.ring_bytes  # a message that is no longer may leave at once
        self._mail = Mail(library, self._channel, self.size, self._while_waiting, self._is_busy)
        self._bounds = functools.lru_cache(1024)(self._even_bounds)
        self._compiled: dict[TreeProgram, Compiled] = {}  # whole: its struct does not keep what it points to
        self._inputs, self._outputs = (self._ffi.new("float *[]", _MAX_NODES) for _ in range(2))
        self._rooms = [_whole_room(memory, geometry, rank, room) for room in range(2)]
        self._next_room, self._is_broken, self._is_at_work = 0, False, False
        # Called again and again while a rank waits here; says whether it wants to be called again soon.
        self.while_waiting: Callable[[], bool | None] | None = None
        self.is_mpi_busy: Callable[[], bool] | None = None  # whether the MPI has messages that this rank must move on

    @classmethod
    def open(
        cls, group: Collectives, members: Sequence[int], room_bytes: int = 0, *, folder: str = FOLDER,
        slot_bytes: int = SLOT_BYTES,
    ) -> NodeChannel | None:  # fmt: skip
        """Open a channel on every node of a group.

        Collective over the group.

        Args:
            group: all ranks call this.
            members: its ranks on this node, in the order in which the channel numbers them.
            room_bytes: of each of the two rooms of a rank (see `room`); 8 MiB at most, less where memory is short.
            folder: where files are memory that the ranks of a node share.
            slot_bytes: of each of the two buffers of a rank; longer data go through them piece by piece.

        Returns:
            None on every rank, if any rank has no library or cannot share memory.
        """
        library = load()
        geometries = possible_geometries(len(members), room_bytes, slot_bytes)
        region = open_region(
            group, members, geometries, folder, library, instead="ranks of this node talk through the MPI"
        )
        if region is None or library is None:
            return None
        told = [json.loads(data) for data in group.all_gather_bytes(json.dumps(sorted(own_cpus())).encode())]
        patience = patience_for([set(told[member]) for member in members], read_launch().local_size)
        return cls(library, region, list(members).index(group.rank), patience, watch(group))

    def close(self) -> None:
        """Give the memory back as soon as nobody has a room of it any more. Not collective."""
        self._is_broken = True
        self._mail.close()
        self._rooms.clear()
        self._channel = self._base = self.while_waiting = self.is_mpi_busy = None

    def room(self, shape: tuple[int, ...]) -> np.ndarray | None:
        """Get a float32 array in shared memory: data that stand there when a collective begins are not copied.

        Not collective.

        Returns:
            One of the two rooms in turn, good until the call after the next; None if it is too small, or others may
            still read from it. A result must not be written there.
        """
        room, count = self._next_room, math.prod(shape)
        if 4 * count > self.room_bytes or not count or not self._lib.hpc_room_is_free(self._open_channel(), room):
            return None
        self._next_room = 1 - room
        return self._rooms[room][:count].reshape(shape)

    def barrier(self) -> None:
        """Wait until every member is here. Collective over the members."""
        self.all_gather_bytes(b"")

    def all_reduce(
        self, program: TreeProgram, nodes: Sequence[Buffer], out: Buffer, *, form: str = "one_shot"
    ) -> None:
        """Finish the tree.

        Collective over the members.

        Args:
            program: of all nodes that the members hold, which together are one node of the tree.
            nodes: contiguous float32 arrays of one size, those of this rank.
            out: for the sum, on every rank.
            form: "one_shot": everyone adds everything; "two_shot": everyone its columns, then they are gathered.
        """
        kind = self._lib.HPC_ONE_SHOT if form == "one_shot" else self._lib.HPC_TWO_SHOT
        assert len(program.results) == 1, f"{program.outputs = }"
        self._reduce(kind, program, nodes, [out], self._bounds(np.asarray(out).size))

    def reduce_slices(
        self, program: TreeProgram, nodes: Sequence[Buffer], outs: Sequence[Buffer], bounds: Sequence[int]
    ) -> None:
        """Merge the nodes of all members as far as they go; each rank gets its own columns of the results.

        Collective over the members. With a program that ends at the root it is a reduce-scatter.

        Args:
            program: of all nodes that the members hold.
            nodes: contiguous float32 arrays of one size, those of this rank.
            outs: an array for each of the program's outputs, for columns [bounds[rank], bounds[rank + 1]) of it.
            bounds: where each rank's columns begin; the last one is where all end.
        """
        self._reduce(self._lib.HPC_SLICES, program, nodes, outs, self._ffi.new("int64_t[]", list(bounds)))

    def reduce_scatter(
        self, program: TreeProgram, nodes: Sequence[Buffer], out: Buffer, bounds: Sequence[int]
    ) -> None:
        """Finish the tree; each rank gets its own columns of the sum. Collective over the members."""
        self.reduce_slices(program, nodes, [out], bounds)

    def gather_slices(self, part: Buffer, out: Buffer, bounds: Sequence[int]) -> None:
        """Give every rank all columns: those of `reduce_slices`, of one output. Collective over the members."""
        self._gather(part, out, [4 * bound for bound in bounds])

    def all_gather(self, send: Buffer, receive: Buffer, counts: Sequence[int]) -> None:
        """Concatenate float32 buffers of `counts[rank]` elements into `receive`, by rank, on every rank.

        Collective over the members.
        """
        self._gather(send, receive, [0, *accumulate(4 * count for count in counts)])

    def gather(self, send: Buffer, receive: Buffer | None, counts: Sequence[int], root: int = 0) -> None:
        """The same, on root only. Collective over the members."""
        into = receive if self.rank == root else np.empty(0, np.float32)
        self._gather(send, into, [0, *accumulate(4 * count for count in counts)], root)

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Give every rank the bytes of all, by rank. Collective over the members."""
        lengths = np.empty(self.size, np.int64)
        self._gather(np.array([len(data)], np.int64), lengths, range(0, 8 * self.size + 8, 8))
        starts = [0, *accumulate(lengths.tolist())]
        gathered = bytearray(starts[-1])
        self._gather(data, gathered, starts)
        return [bytes(gathered[start:stop]) for start, stop in zip(starts, starts[1:], strict=False)]

    def broadcast(self, buffer: Buffer, root: int = 0) -> None:
        """Give every rank what root's buffer holds. Collective over the members."""
        data = self._pointer(buffer, is_written=self.rank != root)
        self._finish(self._lib.hpc_broadcast(self._open_channel(), data, len(data), root, _FIRST_SLICE_NS))

    def all_to_all(self, send: Buffer, receive: Buffer, counts: Sequence[Sequence[int]]) -> None:
        """Give each rank its part of every rank's buffer, in the order of the senders.

        Collective over the members.

        Args:
            send: contiguous float32, a part for each rank.
            receive: contiguous float32, a part from each rank.
            counts: elements from rank i to rank j are counts[i][j], the same table on all.
        """
        new, largest = self._ffi.new, 4 * max(map(max, counts))
        send_starts = new("int64_t[]", [0, *accumulate(4 * count for count in counts[self.rank])])
        receive_starts = new("int64_t[]", [0, *accumulate(4 * row[self.rank] for row in counts)])
        source, target = self._pointer(send), self._pointer(receive, is_written=True)
        self._finish(self._lib.hpc_all_to_all(
            self._open_channel(), source, send_starts, target, receive_starts, largest, _FIRST_SLICE_NS))  # fmt: skip

    def send(self, buffer: Buffer, peer: int, tag: int = 0) -> Outgoing:
        """Start sending a contiguous buffer to a member. Not collective."""
        return self._open_mail().send(_bytes_of(buffer), peer, tag)

    def receive(self, buffer: Buffer, peer: int, tag: int = 0) -> None:
        """Wait for a buffer of known size. Not collective."""
        self.start_receive(buffer, peer, tag).wait()

    def start_receive(self, buffer: Buffer, peer: int, tag: int = 0) -> Incoming:
        """Let a buffer of known size come. Not collective."""
        return self._open_mail().start_receive(_bytes_of(buffer), peer, tag)

    def receive_bytes(self, peer: int, tag: int = 0) -> bytes:
        """Wait for a message of whatever length. Not collective."""
        return self._open_mail().receive_bytes(peer, tag)

    def _reduce(
        self, form: int, program: TreeProgram, nodes: Sequence[Buffer], outs: Sequence[Buffer], bounds: Any
    ) -> None:
        from_buffer, inputs, outputs = self._ffi.from_buffer, self._inputs, self._outputs
        assert len(nodes) == len(program.nodes_by_rank[self.rank]), f"{len(nodes) = }"
        for i, node in enumerate(nodes):
            inputs[i] = from_buffer("float[]", np.asarray(node))
        for i, out in enumerate(outs):
            outputs[i] = from_buffer("float[]", np.asarray(out), True)
        compiled = self._compiled.get(program)
        if compiled is None:
            compiled = self._compiled[program] = compile_program(self._library, program)
        arrays = inputs, len(nodes), bounds, outputs
        self._finish(self._lib.hpc_reduce(self._open_channel(), form, compiled.struct, *arrays, _FIRST_SLICE_NS))

    def _gather(self, send: Buffer, receive: Buffer | None, starts: Iterable[int], root: int = _ALL) -> None:
        source, target = self._pointer(send), self._pointer(receive, is_written=True)
        bounds = self._ffi.new("int64_t[]", list(starts))
        self._finish(self._lib.hpc_gather(self._open_channel(), source, target, bounds, root, _FIRST_SLICE_NS))

    def _finish(self, is_done: int) -> None:
        """Stay with a collective that has begun until it is done."""
        if not is_done:
            self._while_waiting()
            while not self._lib.hpc_continue(self._channel, self._mail.slice_ns()):
                self._while_waiting()

    def _while_waiting(self) -> None:
        try:
            self._mail.push_all()
            turn_meanwhile()
            self._check()
            self._is_at_work = self.while_waiting is not None and bool(self.while_waiting())
        except BaseException:
            self._is_broken = True  # a collective that was left cannot be gone on with
            raise

    def _is_busy(self) -> bool:
        is_mpi_busy = self.is_mpi_busy is not None and self.is_mpi_busy()
        return self._is_at_work or is_mpi_busy or is_working_meanwhile()

    def _open_channel(self) -> Any:
        if self._is_broken:
            raise RankFailedError("a rank has died, or this rank has left: the channel of its node is closed")
        return self._channel

    def _open_mail(self) -> Mail:
        self._open_channel()
        return self._mail

    def _pointer(self, buffer: Buffer | None, *, is_written: bool = False) -> Any:
        data = buffer if isinstance(buffer, bytes | bytearray) else np.asarray(buffer)
        return self._ffi.from_buffer("char[]", data, require_writable=is_written)

    def _even_bounds(self, count: int) -> Any:
        return self._ffi.new("int64_t[]", slice_bounds(count, self.size))


def slice_bounds(count: int, size: int) -> list[int]:
    """Cut columns into a slice for each rank, as even as whole cache lines allow; gives where each begins, and the end.

    Not collective.
    """
    lines = -(-count // 16)
    return [min(count, 16 * (lines * rank // size)) for rank in range(size)] + [count]


def _whole_room(memory: mmap.mmap, geometry: Geometry, rank: int, room: int) -> np.ndarray:
    start = rank * geometry.part_bytes + geometry.rooms + room * geometry.room_bytes
    return np.frombuffer(memory, np.float32, geometry.room_bytes // 4, start)


def _bytes_of(buffer: Buffer) -> memoryview:
    view = memoryview(buffer if isinstance(buffer, bytes | bytearray) else np.asarray(buffer))  # type: ignore[arg-type]
    return view.cast("B") if view.nbytes else memoryview(b"")
