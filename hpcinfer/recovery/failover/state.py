"""What a survivor brings when its replica regroups: the sequences that it knows, as far as it has followed them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import accumulate

import psutil

from hpcinfer.comm.launcher import read_launch
from hpcinfer.engine.replica import Replica
from hpcinfer.engine.request import Request
from hpcinfer.kernels.protocol import Kernels

_DEVICE_SHARE = 0.9  # of a device's memory; its driver and the library of its collectives take some


@dataclass(frozen=True)
class State:
    """The sequences of a replica after so many step records.

    The one that has followed longest knows most: records are the same for all, and a later one takes nothing away.
    """

    epoch: int  # of the replica's group
    num_records: int
    requests: tuple[Request, ...]
    part: str = ""  # of the leader's finished rows
    free_bytes: int = 0  # of memory that this rank may have

    @property
    def progress(self) -> tuple[int, int]:
        """How far it has followed."""
        return self.epoch, self.num_records

    def to_bytes(self) -> bytes:
        """Encode."""
        requests = [request.to_bytes() for request in self.requests]
        head = [self.epoch, self.num_records, self.part, self.free_bytes, [len(data) for data in requests]]
        return b"".join([json.dumps(head).encode(), b"\n", *requests])

    @staticmethod
    def from_bytes(data: bytes) -> State:
        """Decode what `to_bytes` made."""
        head, _, body = data.partition(b"\n")
        epoch, num_records, part, free_bytes, lengths = json.loads(head)
        parts = zip(accumulate(lengths), lengths, strict=True)
        requests = tuple(Request.from_bytes(body[end - length : end]) for end, length in parts)
        return State(epoch, num_records, requests, part, free_bytes)


def observe(replica: Replica | None, epoch: int, part: str, last: State) -> State:
    """Take the state of a replica whose loop was interrupted; the last one if that had not begun. Not collective."""
    if replica is None or replica.engine.num_records == 0:
        return last
    return State(epoch, replica.engine.num_records, tuple(replica.scheduler.unfinished()), part)


def free_memory(kernels: Kernels) -> int:
    """Bytes that this rank may take: of its device, or its share of what is free on the node and what it has already.

    Not collective.
    """
    if (of_device := kernels.total_bytes()) is not None:
        return int(_DEVICE_SHARE * of_device)
    share = psutil.virtual_memory().available // max(1, read_launch().local_size)
    return int(share + psutil.Process().memory_info().rss)
