"""Who sends what to whom inside a replica: hidden states down the stages, results to the leader, records to all.

Ranks of a replica are numbered stage by stage, tp innermost; rank 0 is the leader. Sends do not wait for the receiver
to be there. Hidden states of the next micro-batch come while this one is computed: through memory by themselves, and as
far as `turn` lets the MPI work meanwhile.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from hpcinfer.comm.device.group import DeviceGroup
from hpcinfer.comm.operations import Operations
from hpcinfer.comm.outbox import Outbox
from hpcinfer.comm.protocol import Pending
from hpcinfer.comm.waiting import turn_meanwhile
from hpcinfer.engine.sampler import RowResult, decode_results, encode_results
from hpcinfer.kernels.protocol import Array

_TAG_HIDDEN, _TAG_RESULTS, _TAG_RECORD = 11, 12, 13


@dataclass(frozen=True)
class Place:
    """Where a rank stands in its replica."""

    pp: int  # stages
    tp: int  # ranks of a stage
    pp_rank: int
    tp_rank: int

    @property
    def is_first(self) -> bool:
        """Whether this is the first stage."""
        return self.pp_rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this is the last stage."""
        return self.pp_rank == self.pp - 1

    @property
    def is_leader(self) -> bool:
        """Whether this rank leads its replica."""
        return self.pp_rank == 0 and self.tp_rank == 0

    @property
    def is_sampler(self) -> bool:
        """Whether this rank samples."""
        return self.is_last and self.tp_rank == 0


class Pipeline:
    """The messages of one replica.

    Args:
        operations: of its ranks.
        place: of this one.
        max_tokens: of a micro-batch.
        allocate: makes room for the hidden states of some tokens, [T, D].
        arrays: moves hidden states, where they are in the memory of GPUs.
    """

    def __init__(
        self, operations: Operations, place: Place, max_tokens: int, allocate: Callable[[int], Array],
        arrays: DeviceGroup | None = None,
    ) -> None:  # fmt: skip
        self.replica, self.place, self._operations, self._arrays = operations.group, place, operations, arrays
        self._max_tokens, self._allocate, self._token_bytes = max_tokens, allocate, allocate(1).nbytes
        self._sent = Outbox()
        self._own_results: deque[list[RowResult]] = deque()
        self._coming: tuple[Array, Pending] | None = None  # of the next micro-batch

    def receive_hidden(self, num_tokens: int) -> Array:
        """Take hidden states [num_tokens, D] from the same tp rank of the stage before."""
        peer = self.replica.rank - self.place.tp
        if self._arrays is not None:  # none is let come early: what a GPU does waits in line behind it
            room = self._allocate(num_tokens)
            self._arrays.receive(room, peer, _TAG_HIDDEN)
            return room
        if self._operations.is_near(peer, num_tokens * self._token_bytes):
            room = self._allocate(num_tokens)
            self._operations.receive(room, peer, _TAG_HIDDEN)
            return room
        whole, pending = self._coming or self._let_come()
        self.replica.wait_all([pending])
        self._coming = self._let_come()
        return whole[:num_tokens]

    def send_hidden(self, hidden: Array) -> None:
        """Start sending hidden states to the same tp rank of the next stage."""
        send = self._operations.send if self._arrays is None else self._arrays.send
        self._sent.keep(send(hidden, self.replica.rank + self.place.tp, _TAG_HIDDEN))

    def turn(self) -> None:
        """Let messages move on: an MPI without threads of its own works only while it is called. Not collective."""
        turn_meanwhile()
        self._sent.turn()
        if self._coming is not None:
            self._coming[1].test()

    def is_busy(self) -> bool:
        """Whether messages are under way that move only while the MPI is called. Not collective."""
        self._sent.turn()
        return self._coming is not None or not self._sent.is_empty

    def _let_come(self) -> tuple[Array, Pending]:
        room = self._allocate(self._max_tokens)
        return room, self.replica.start_receive(room, self.replica.rank - self.place.tp, _TAG_HIDDEN)

    def send_results(self, results: list[RowResult]) -> None:
        """Start sending what was sampled to the leader."""
        if self.place.is_leader:
            self._own_results.append(results)
        else:
            self._sent.keep(self._operations.send_bytes(encode_results(results), 0, _TAG_RESULTS))

    def receive_results(self, num_rows: int) -> list[RowResult]:
        """Wait for what was sampled from the oldest batch. On the leader."""
        if self.place.is_sampler:
            return self._own_results.popleft()
        data = self._operations.receive_bytes((self.place.pp - 1) * self.place.tp, _TAG_RESULTS)
        return decode_results(data, num_rows)

    def send_record(self, data: bytes) -> None:
        """Start sending the step record to all others. On the leader."""
        for peer in range(1, self.replica.size):
            self._sent.keep(self._operations.send_bytes(data, peer, _TAG_RECORD))

    def receive_record(self) -> bytes:
        """Wait for the step record. On all but the leader."""
        return self._operations.receive_bytes(0, _TAG_RECORD)

    def flush(self) -> None:
        """Wait until all that was sent has left; nothing more comes."""
        self._sent.flush()
        if self._coming is not None:
            self._coming[1].cancel()
            self._coming = None
