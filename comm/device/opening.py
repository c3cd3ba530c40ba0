"""Opening a group of GPUs: through NCCL where every rank has a GPU of its own and a binding, else through the MPI."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence

from hpcinfer.comm.device.arrays import DeviceArrays
from hpcinfer.comm.device.awareness import takes_device_memory
from hpcinfer.comm.device.communicator import Binding, Communicator, find_binding
from hpcinfer.comm.device.group import DeviceGroup
from hpcinfer.comm.device.nccl_group import NcclGroup, abort
from hpcinfer.comm.device.staged_group import StagedGroup
from hpcinfer.comm.protocol import Collectives
from hpcinfer.comm.waiting import Pause
from hpcinfer.errors import RankFailedError

logger = logging.getLogger(__name__)

_JOIN_S = 120.0  # NCCL takes seconds, on thousands of GPUs a minute; what takes longer will not come


def open_device_group(
    group: Collectives, arrays: DeviceArrays, find: Callable[[], Binding | None] = find_binding
) -> DeviceGroup:
    """Make a group of GPUs over a group of the MPI.

    Collective over the group; the same kind on all ranks. The root logs which, and why.

    Args:
        group: of the MPI; a rank has one GPU.
        arrays: of this rank's GPU.
        find: finds a binding of NCCL on this rank, if there is one.

    Raises:
        RankFailedError: a rank has died meanwhile.
    """
    staged = StagedGroup(group, arrays, is_direct=takes_device_memory(group, arrays))
    if group.size == 1:
        return staged
    binding = find()
    told = [json.loads(data) for data in group.all_gather_bytes(
        json.dumps([arrays.gpu_id, binding.name if binding else ""]).encode())]  # fmt: skip
    opened: DeviceGroup = staged
    reason = _what_is_in_the_way(*zip(*told, strict=True))
    if binding is not None and not reason:
        communicator, reason = _join_all(staged, binding)
        if communicator is not None:
            opened = NcclGroup(group, arrays, communicator, staged)
    if group.rank == 0:
        logger.info("%d GPUs talk through %s", group.size, _describe(opened, binding, staged, reason))
    return opened


def _what_is_in_the_way(gpus: Sequence[str], bindings: Sequence[str]) -> str:
    """Why there is no NCCL; empty if nothing is in the way. The same on all ranks."""
    for rank, gpu in enumerate(gpus):
        if gpu in gpus[:rank]:
            return f"ranks {gpus.index(gpu)} and {rank} share a GPU"
    if "" in bindings:
        return f"rank {bindings.index('')} has neither nccl4py nor cupy with NCCL"
    names = sorted(set(bindings))
    return "" if len(names) == 1 else f"ranks have different bindings of NCCL: {', '.join(names)}"


def _describe(opened: DeviceGroup, binding: Binding | None, staged: StagedGroup, reason: str) -> str:
    if opened is not staged and binding is not None:
        return f"NCCL ({binding.name})"
    how = "which takes their memory" if staged.is_direct else "by way of pinned memory"
    return f"the MPI, {how}: {reason}"


def _join_all(staged: StagedGroup, binding: Binding) -> tuple[Communicator | None, str]:
    """Make a communicator, or none on all ranks, and say what went wrong."""
    group = staged.group
    unique_id = group.broadcast_bytes(_new_id(binding) if group.rank == 0 else None)
    if not unique_id:
        return None, "NCCL gives no id for a communicator"
    joining = _Joining(staged, binding, unique_id)
    error = joining.wait()
    errors = [data.decode() for data in group.all_gather_bytes(error.encode())]
    failed = [rank for rank, each in enumerate(errors) if each]
    if failed:
        if joining.communicator is not None:
            abort(staged.arrays, joining.communicator)
        return None, f"NCCL fails on rank {failed[0]}: {errors[failed[0]]}"
    return joining.communicator, ""


def _new_id(binding: Binding) -> bytes:
    try:
        return binding.new_id()
    except Exception as error:  # of any binding
        logger.warning("%s: %s", type(error).__name__, error)
        return b""


class _Joining:
    """A thread that makes a communicator and sends first messages, which connects all ranks with one another.

    Both wait for all ranks in the library: were one to die meanwhile, the thread would be left behind.
    """

    def __init__(self, staged: StagedGroup, binding: Binding, unique_id: bytes) -> None:
        self._staged, self._binding, self._unique_id = staged, binding, unique_id
        self.communicator: Communicator | None = None
        self._error = ""
        self._thread = threading.Thread(target=self._run, name="NCCL", daemon=True)
        self._thread.start()

    def wait(self) -> str:
        """Wait for the thread; what went wrong, or empty. Not collective.

        Raises:
            RankFailedError: a rank has died.
        """
        pause, end = Pause(), time.monotonic() + _JOIN_S
        while self._thread.is_alive():
            try:
                self._staged.check()
            except RankFailedError:
                if self.communicator is not None:
                    abort(self._staged.arrays, self.communicator)
                raise
            if time.monotonic() > end:
                return f"not ready after {_JOIN_S:.0f} s"
            pause()
        return self._error

    def _run(self) -> None:
        arrays, group = self._staged.arrays, self._staged.group
        try:
            arrays.bind()
            made = self._binding.join(group.size, group.rank, self._unique_id)
            self.communicator = made
            self._connect(made)
        except Exception as error:  # of any binding, and of the GPU
            self._error = f"{type(error).__name__}: {error}"

    def _connect(self, nccl: Communicator) -> None:
        """Exchange a float between all ranks in all ways, and wait: NCCL may connect ranks at the first use."""
        arrays, group = self._staged.arrays, self._staged.group
        address, stream = arrays.address(room := arrays.empty(group.size + 1)), arrays.stream()
        nccl.group_start()
        for peer in range(group.size):
            if peer != group.rank:
                nccl.send(address + 4 * group.size, 4, peer, stream)
                nccl.receive(address + 4 * peer, 4, peer, stream)
        nccl.group_end()
        nccl.all_reduce(address, address, 1, stream)
        nccl.broadcast(address, 4, 0, stream)
        nccl.all_gather(address + 4 * group.size, address, 4, stream)
        arrays.wait(lambda: None)
        del room
