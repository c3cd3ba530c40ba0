"""Who sends what to whom inside a replica: hidden states down the stages, results to the leader, records to all.

Ranks of a replica are numbered stage by stage, tp innermost; rank 0 is the leader. Sends never block.
"""

from collections import deque
from dataclasses import dataclass

from hpcinfer.comm.outbox import Outbox
from hpcinfer.comm.protocol import Collectives
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
    """The messages of one replica."""

    def __init__(self, replica: Collectives, place: Place) -> None:
        self.replica, self.place = replica, place
        self._sent = Outbox()
        self._own_results: deque[bytes] = deque()

    def receive_hidden(self, buffer: Array) -> None:
        """Take hidden states from the same tp rank of the stage before."""
        self.replica.receive(buffer, self.replica.rank - self.place.tp, _TAG_HIDDEN)

    def send_hidden(self, hidden: Array) -> None:
        """Start sending hidden states to the same tp rank of the next stage."""
        self._sent.keep(self.replica.send(hidden, self.replica.rank + self.place.tp, _TAG_HIDDEN))

    def send_results(self, data: bytes) -> None:
        """Start sending what was sampled to the leader."""
        if self.place.is_leader:
            self._own_results.append(data)
        else:
            self._sent.keep(self.replica.send_bytes(data, 0, _TAG_RESULTS))

    def receive_results(self) -> bytes:
        """Wait for what was sampled from the oldest batch. On the leader."""
        if self.place.is_sampler:
            return self._own_results.popleft()
        return self.replica.receive_bytes((self.place.pp - 1) * self.place.tp, _TAG_RESULTS)

    def send_record(self, data: bytes) -> None:
        """Start sending the step record to all others. On the leader."""
        for peer in range(1, self.replica.size):
            self._sent.keep(self.replica.send_bytes(data, peer, _TAG_RECORD))

    def receive_record(self) -> bytes:
        """Wait for the step record. On all but the leader."""
        return self.replica.receive_bytes(0, _TAG_RECORD)

    def flush(self) -> None:
        """Wait until all that was sent has left."""
        self._sent.flush()
