"""Whether the MPI takes memory of GPUs: it is asked, and then tried, since libraries say so and do otherwise."""

from collections.abc import Callable

import numpy as np

from hpcinfer.comm.device.arrays import DeviceArrays
from hpcinfer.comm.library import claims_device_memory
from hpcinfer.comm.node.patience import watch
from hpcinfer.comm.protocol import Collectives

_LENGTHS = (1 << 8, 1 << 18)  # floats: libraries move few and many bytes in different ways
_TAG = 6


def takes_device_memory(
    group: Collectives, arrays: DeviceArrays, claims: Callable[[], bool] = claims_device_memory
) -> bool:
    """Whether messages from and to the memory of GPUs arrive as they were sent.

    Collective over the group; the same answer on all ranks. Nothing is tried unless all libraries say that they can.

    Args:
        group: of the MPI.
        arrays: of this rank's GPU.
        claims: what the library of this rank says.
    """
    if group.size == 1 or not _is_true_for_all(group, claims()):
        return False
    have_arrived = [_arrives(group, arrays, length) for length in _LENGTHS]  # all of them, on all ranks
    return _is_true_for_all(group, all(have_arrived))


def _arrives(group: Collectives, arrays: DeviceArrays, length: int) -> bool:
    """Send to the next rank, and look at what the one before has sent."""
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    mine, theirs, look = arrays.empty(length), arrays.empty(length), watch(group)
    host = arrays.pinned(4 * length)
    host[:] = _pattern(group.rank, length)
    arrays.to_device(host, mine)
    arrays.wait(look)
    pending = []
    try:
        pending.append(group.start_receive(theirs, before, _TAG))
        pending.append(group.send(mine, after, _TAG))
        group.wait_all(pending)
    except (TypeError, ValueError, BufferError):  # of mpi4py: it cannot see such memory
        for each in pending:
            each.cancel()
        return False
    arrays.to_host(theirs, host)
    arrays.wait(look)
    return np.array_equal(host, _pattern(before, length))


def _pattern(rank: int, length: int) -> np.ndarray:
    return np.random.default_rng([rank, length]).integers(0, 256, 4 * length, np.uint8)


def _is_true_for_all(group: Collectives, answer: bool) -> bool:
    return all(each == b"\1" for each in group.all_gather_bytes(bytes([answer])))
