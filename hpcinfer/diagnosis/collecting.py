"""Bytes of all ranks on the root, without waiting for those that do not come."""

import contextlib
import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from hpcinfer.errors import RankFailedError

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

_TAG = 77
_NAP_S = 0.0005


def collect(world: "Collectives", data: bytes, limit_s: float) -> dict[int, bytes]:
    """Send every rank's bytes to the root.

    Not collective: the root waits for `limit_s` at most, the others for the root to take theirs.

    Returns:
        On the root the bytes of the ranks that answered, by rank; elsewhere nothing.
    """
    if world.rank != 0:
        world.send_bytes(data, 0, _TAG).wait()
        return {}
    end, answers = time.monotonic() + limit_s, {0: data}
    with contextlib.suppress(RankFailedError):  # no more answers then, from whichever rank
        while len(answers) < world.size and time.monotonic() < end:
            message = world.probe_bytes(_TAG)
            if message is None:
                time.sleep(_NAP_S)
            else:
                answers[message[0]] = message[1]
    return dict(sorted(answers.items()))


def missing(answers: Collection[int], size: int) -> tuple[int, ...]:
    """Ranks that have not answered."""
    return tuple(rank for rank in range(size) if rank not in answers)
