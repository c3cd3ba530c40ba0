"""The step record: all that is local or timed, sent by the leader to its replica once per step. Small and binary."""

import struct
from dataclasses import dataclass

import numpy as np

from hpcinfer.engine.request import Request
from hpcinfer.engine.sequence import Finish

_HEADER = struct.Struct("<q?iii8s")  # step, last, tokens, works, requests, digest
_FINISHES = tuple(Finish)  # by value
NO_TOKEN = -1
UNBOUNDED = 2**31 - 1  # tokens of the next batch: as many as the limits allow


@dataclass(frozen=True)
class StepRecord:
    """Results of the oldest micro-batch in flight, new requests, and whether this is the end."""

    step: int
    token_ids: tuple[int, ...]  # per work of that micro-batch; NO_TOKEN where none was sampled
    finishes: tuple[Finish, ...]  # per work
    requests: tuple[Request, ...] = ()
    is_last: bool = False
    num_tokens: int = UNBOUNDED  # of the next batch, at most; 0: what is in flight is the last of it
    digest: bytes = bytes(8)  # of the leader's scheduler before this record, with --debug-lockstep

    def to_bytes(self) -> bytes:
        """Encode."""
        counts = len(self.token_ids), len(self.requests)
        header = _HEADER.pack(self.step, self.is_last, self.num_tokens, *counts, self.digest)
        requests = [request.to_bytes() for request in self.requests]
        lengths = np.asarray([len(data) for data in requests], np.int32)
        token_ids = np.asarray(self.token_ids, np.int32).tobytes()
        return b"".join([header, token_ids, bytes(self.finishes), lengths.tobytes(), *requests])

    @staticmethod
    def from_bytes(data: bytes) -> "StepRecord":
        """Decode what `to_bytes` made."""
        step, is_last, num_tokens, num_works, num_requests, digest = _HEADER.unpack_from(data)
        at = _HEADER.size
        token_ids = tuple(np.frombuffer(data, np.int32, num_works, at).tolist())
        finishes = tuple(_FINISHES[value] for value in data[at + 4 * num_works : at + 5 * num_works])
        at += 5 * num_works
        lengths = np.frombuffer(data, np.int32, num_requests, at)
        ends = np.cumsum(lengths, dtype=np.int64) + at + 4 * num_requests
        requests = tuple(
            Request.from_bytes(data[end - length : end]) for end, length in zip(ends, lengths, strict=True)
        )
        return StepRecord(step, token_ids, finishes, requests, is_last, num_tokens, digest)
