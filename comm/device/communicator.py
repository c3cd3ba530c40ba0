"""A thin layer over NCCL, and over RCCL under the same names: communicators of NVIDIA's nccl4py, or of cupy.

Addresses and streams are numbers. All calls but `join` only enqueue work on a stream. Nothing here is imported before
it is asked for.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable
from typing import Any, Protocol

logger = logging.getLogger(__name__)


class Communicator(Protocol):
    """One rank's end. What goes wrong in a call is an exception of the binding."""

    def all_reduce(self, source: int, target: int, count: int, stream: int) -> None:
        """Add float32 of all ranks up, in whatever order."""

    def all_gather(self, source: int, target: int, num_bytes: int, stream: int) -> None:
        """Concatenate as many bytes of each rank."""

    def broadcast(self, address: int, num_bytes: int, root: int, stream: int) -> None:
        """Give every rank root's bytes."""

    def send(self, address: int, num_bytes: int, peer: int, stream: int) -> None:
        """Send bytes to a rank that receives as many."""

    def receive(self, address: int, num_bytes: int, peer: int, stream: int) -> None:
        """Receive as many bytes as a rank sends."""

    def group_start(self) -> None:
        """Begin calls that are one piece of work, in which sends and receives do not wait for one another."""

    def group_end(self) -> None:
        """Enqueue them."""

    def async_error(self) -> str:
        """What has gone wrong since; empty if nothing."""

    def abort(self) -> None:
        """End all work that is enqueued, and the communicator. May be called by any thread."""


class Binding(Protocol):
    """A way to make communicators."""

    name: str

    def new_id(self) -> bytes:
        """Make what the ranks of one communicator have in common. On one of them."""

    def join(self, size: int, rank: int, unique_id: bytes) -> Communicator:
        """Make a communicator on the current GPU of this thread. Collective; waits for all ranks."""


def find_binding() -> Binding | None:
    """Find a binding that can be used here: nccl4py, else cupy. Not collective."""
    for make in (_Nccl4py, _Cupy):
        try:
            return make()
        except Exception as error:  # of any binding: it is not there, or has no library, or none that it knows
            logger.debug("no NCCL by way of %s: %s: %s", make.name, type(error).__name__, error)
    return None


class _Cupy:
    """cupy's binding; its ROCm builds show RCCL under the same names."""

    name = "cupy"

    def __init__(self) -> None:
        self._nccl = importlib.import_module("cupy.cuda.nccl")
        self._nccl.get_version()  # fails where the library is not there

    def new_id(self) -> bytes:
        return json.dumps(self._nccl.get_unique_id()).encode()  # characters as numbers: signed or not, as C has them

    def join(self, size: int, rank: int, unique_id: bytes) -> Communicator:
        return _CupyCommunicator(self._nccl, self._nccl.NcclCommunicator(size, tuple(json.loads(unique_id)), rank))


class _CupyCommunicator:
    def __init__(self, nccl: Any, communicator: Any) -> None:
        self._nccl, self._it = nccl, communicator

    def all_reduce(self, source: int, target: int, count: int, stream: int) -> None:
        self._it.allReduce(source, target, count, self._nccl.NCCL_FLOAT32, self._nccl.NCCL_SUM, stream)

    def all_gather(self, source: int, target: int, num_bytes: int, stream: int) -> None:
        self._it.allGather(source, target, num_bytes, self._nccl.NCCL_INT8, stream)

    def broadcast(self, address: int, num_bytes: int, root: int, stream: int) -> None:
        self._it.broadcast(address, address, num_bytes, self._nccl.NCCL_INT8, root, stream)

    def send(self, address: int, num_bytes: int, peer: int, stream: int) -> None:
        self._it.send(address, num_bytes, self._nccl.NCCL_INT8, peer, stream)

    def receive(self, address: int, num_bytes: int, peer: int, stream: int) -> None:
        self._it.recv(address, num_bytes, self._nccl.NCCL_INT8, peer, stream)

    def group_start(self) -> None:
        self._nccl.groupStart()

    def group_end(self) -> None:
        self._nccl.groupEnd()

    def async_error(self) -> str:
        return _error_of(self._it.check_async_error)

    def abort(self) -> None:
        self._it.abort()


class _Nccl4py:
    """NVIDIA's binding. Its communicators ask for their size while they are made, which non-blocking ones refuse."""

    name = "nccl4py"

    def __init__(self) -> None:
        self._core = importlib.import_module("nccl.core")
        self._calls = importlib.import_module("nccl.bindings.nccl")  # NCCL's own functions, which take addresses
        self._calls.get_version()  # fails where the library is not there

    def new_id(self) -> bytes:
        return bytes(self._core.get_unique_id().as_bytes)

    def join(self, size: int, rank: int, unique_id: bytes) -> Communicator:
        made = self._core.Communicator.init(size, rank, self._core.UniqueId.from_bytes(unique_id))
        return _Nccl4pyCommunicator(self._calls, made)


class _Nccl4pyCommunicator:
    def __init__(self, calls: Any, communicator: Any) -> None:
        self._calls, self._it, self._ptr = calls, communicator, int(communicator.ptr)
        self._float, self._byte = int(calls.DataType.Float32), int(calls.DataType.Int8)
        self._sum = int(calls.RedOp.Sum)

    def all_reduce(self, source: int, target: int, count: int, stream: int) -> None:
        self._calls.all_reduce(source, target, count, self._float, self._sum, self._ptr, stream)

    def all_gather(self, source: int, target: int, num_bytes: int, stream: int) -> None:
        self._calls.all_gather(source, target, num_bytes, self._byte, self._ptr, stream)

    def broadcast(self, address: int, num_bytes: int, root: int, stream: int) -> None:
        self._calls.broadcast(address, address, num_bytes, self._byte, root, self._ptr, stream)

    def send(self, address: int, num_bytes: int, peer: int, stream: int) -> None:
        self._calls.send(address, num_bytes, self._byte, peer, self._ptr, stream)

    def receive(self, address: int, num_bytes: int, peer: int, stream: int) -> None:
        self._calls.recv(address, num_bytes, self._byte, peer, self._ptr, stream)

    def group_start(self) -> None:
        self._calls.group_start()

    def group_end(self) -> None:
        self._calls.group_end()

    def async_error(self) -> str:
        result = int(self._it.get_async_error())
        return "" if result == int(self._calls.Result.Success) else str(self._calls.get_error_string(result))

    def abort(self) -> None:
        self._it.abort()


def _error_of(work: Callable[[], object]) -> str:
    """What a call raises, as text; empty if nothing."""
    try:
        work()
    except Exception as error:  # cupy has no words for the newest codes, and fails with a KeyError
        return f"{type(error).__name__}: {error}"
    return ""
