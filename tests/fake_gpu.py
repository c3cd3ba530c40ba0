"""A GPU that is none, and a NCCL over it: work waits in a stream until somebody looks, and messages may hang."""

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hpcinfer.kernels.gpu.arrays import GpuArrays

_TAG = 50  # of the messages of the NCCL
_LIMIT_S = 8.0  # what takes longer hangs

_streams: dict[int, "FakeGpu"] = {}


class OnGpu(torch.Tensor):
    """A tensor whose memory the host must not touch."""

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("the host reads memory of a GPU")

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("the host reads memory of a GPU")


class FakeGpu(GpuArrays):
    """Memory of the host behind a stream of work, which a thread does in order, some time later."""

    def __init__(self, gpu_id: str) -> None:
        super().__init__(torch.device("cpu"))
        self.gpu_id, self.is_recording_now, self.most_ahead = gpu_id, False, 0
        self._work: deque[Callable[[], object]] = deque()
        self._num_enqueued, self._num_done, self.work_s = 0, 0, 0.0002
        self._lock, self._thread = threading.Lock(), None  # type: threading.Lock, threading.Thread | None
        self._error: Exception | None = None
        self._held: list[torch.Tensor] = []  # memory of a GPU is free when its stream has passed, not before
        _streams[id(self)] = self

    def enqueue(self, work: Callable[[], object]) -> None:
        """Let work be done later; it is done when it does not return False."""
        if threading.current_thread() is self._thread:
            work()
            return
        with self._lock:
            self._work.append(work)
            self._num_enqueued += 1
            self.most_ahead = max(self.most_ahead, len(self._work))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()

    def _run(self) -> None:
        end = time.monotonic() + _LIMIT_S
        while True:
            time.sleep(self.work_s)
            try:
                while self._work[0]() is False:
                    if time.monotonic() > end:
                        raise TimeoutError("work of the stream hangs")
                    time.sleep(0.0002)
            except Exception as error:
                self._error = error
            with self._lock:
                self._work.popleft()
                self._num_done += 1
                if not self._work:
                    self._thread = None
                    return

    def put(self, values: np.ndarray) -> torch.Tensor:
        """Make an array of the GPU; at once."""
        self._held.append(torch.from_numpy(values.copy()).as_subclass(OnGpu))
        return self._held[-1]

    def get(self, array: torch.Tensor) -> np.ndarray:
        """Read an array when all is done."""
        self.wait(lambda: None)
        return array.as_subclass(torch.Tensor).numpy().copy()

    def empty(self, length: int) -> torch.Tensor:
        return self.put(np.full(length, np.nan, np.float32))

    def stream(self) -> int:
        return id(self)

    def is_recording(self) -> bool:
        return self.is_recording_now

    def copy(self, source: Any, target: Any) -> None:
        self.enqueue(lambda: super(FakeGpu, self).copy(source, target))

    def evaluation(self, program: Any, nodes: Any, outs: Sequence[Any]) -> Callable[[], None]:
        run = super().evaluation(program, nodes, outs)
        return lambda: self.enqueue(run)

    def to_host(self, source: Any, target: np.ndarray) -> None:
        self.enqueue(lambda: super(FakeGpu, self).to_host(source, target))

    def to_device(self, source: np.ndarray, target: Any) -> None:
        self.enqueue(lambda: super(FakeGpu, self).to_device(source, target))

    def mark(self) -> Any:
        return self._num_enqueued

    def is_reached(self, mark: Any) -> bool:
        if self._error is not None:
            raise self._error
        return self._num_done >= mark

    def wait(self, check: Callable[[], None], mark: Any = None) -> None:
        end = time.monotonic() + _LIMIT_S

        def look() -> None:
            check()
            if time.monotonic() > end:
                raise TimeoutError("nobody ends the wait")

        super().wait(look, mark)


class FakeNccl:
    """A binding whose communicators move bytes between addresses over a group."""

    def __init__(self, wire: Any, name: str = "fake") -> None:
        self.wire, self.name, self.made = wire, name, list[FakeCommunicator]()

    def new_id(self) -> bytes:
        """Make an id."""
        return b"the id"

    def join(self, size: int, rank: int, unique_id: bytes) -> "FakeCommunicator":
        """Make a communicator."""
        assert (size, rank, unique_id) == (self.wire.size, self.wire.rank, b"the id")
        self.made.append(FakeCommunicator(self.wire))
        return self.made[-1]


class FakeCommunicator:
    """One rank's end. `is_hanging` stops what is enqueued; `error` is what went wrong."""

    def __init__(self, wire: Any) -> None:
        self._wire, self._calls, self._stream = wire, list[tuple[int, int, int, bool]](), 0
        self.is_hanging, self.error, self.num_aborts, self.num_groups = False, "", 0, 0

    def group_start(self) -> None:
        """Begin."""
        assert not self._calls

    def send(self, address: int, num_bytes: int, peer: int, stream: int) -> None:
        """Note a message."""
        self._calls.append((address, num_bytes, peer, True))
        self._stream = stream

    def receive(self, address: int, num_bytes: int, peer: int, stream: int) -> None:
        """Note a message."""
        self._calls.append((address, num_bytes, peer, False))
        self._stream = stream

    def group_end(self) -> None:
        """Enqueue what was noted."""
        assert not self.num_aborts and self._calls
        calls, self._calls = self._calls, []
        self.num_groups += 1
        _streams[self._stream].enqueue(_Messages(self, self._wire, calls))

    def all_gather(self, source: int, target: int, num_bytes: int, stream: int) -> None:
        """Send to all, and receive of all."""
        own = target + num_bytes * self._wire.rank
        _streams[stream].enqueue(lambda: ctypes.memmove(own, source, num_bytes) and None)
        for peer in self._peers():
            self.send(own, num_bytes, peer, stream)
            self.receive(target + num_bytes * peer, num_bytes, peer, stream)
        self.group_end()

    def broadcast(self, address: int, num_bytes: int, root: int, stream: int) -> None:
        """Send to all, or receive."""
        for peer in self._peers() if self._wire.rank == root else [root]:
            (self.send if self._wire.rank == root else self.receive)(address, num_bytes, peer, stream)
        self.group_end()

    def all_reduce(self, source: int, target: int, count: int, stream: int) -> None:
        """Add up from the last rank to the first."""
        room = np.empty((self._wire.size, count), np.float32)
        self.all_gather(source, room.ctypes.data, 4 * count, stream)

        def add() -> None:
            total = sum(room[::-1], np.zeros(count, np.float32))
            ctypes.memmove(target, total.ctypes.data, 4 * count)

        _streams[stream].enqueue(add)

    def async_error(self) -> str:
        """What went wrong."""
        return self.error

    def abort(self) -> None:
        """End what is enqueued."""
        self.num_aborts += 1

    def _peers(self) -> list[int]:
        return [peer for peer in range(self._wire.size) if peer != self._wire.rank]


class _Messages:
    """Work of the stream: done when all messages have come, or when the communicator was aborted."""

    def __init__(self, nccl: FakeCommunicator, wire: Any, calls: list[tuple[int, int, int, bool]]) -> None:
        self._nccl, self._wire, self._calls = nccl, wire, calls
        self._pending: list[Any] | None = None
        self._coming: list[tuple[int, np.ndarray]] = []

    def __call__(self) -> bool:
        if self._nccl.num_aborts:
            return True
        if self._nccl.is_hanging:
            return False
        if self._pending is None:
            self._pending = [self._start(*call) for call in self._calls]
        self._pending = [each for each in self._pending if not each.test()]
        for address, data in self._coming if not self._pending else ():
            ctypes.memmove(address, data.ctypes.data, data.nbytes)
        return not self._pending

    def _start(self, address: int, num_bytes: int, peer: int, is_sent: bool) -> Any:
        if is_sent:
            return self._wire.send(np.frombuffer(ctypes.string_at(address, num_bytes), np.uint8), peer, _TAG)
        self._coming.append((address, np.empty(num_bytes, np.uint8)))
        return self._wire.start_receive(self._coming[-1][1], peer, _TAG)


class AwareGroup:
    """A group of an MPI that takes memory of GPUs; a lying one spoils what is long."""

    def __init__(self, group: Any, *, lies: bool = False) -> None:
        self._group, self._lies = group, lies

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def send(self, buffer: Any, peer: int, tag: int = 0) -> Any:
        """Send from the memory of a GPU."""
        plain = _plain(buffer)
        spoiled = np.zeros_like(plain) if self._lies and len(plain) > 1000 else plain
        return self._group.send(spoiled, peer, tag)

    def start_receive(self, buffer: Any, peer: int, tag: int = 0) -> Any:
        """Receive into the memory of a GPU."""
        return self._group.start_receive(_plain(buffer), peer, tag)


def _plain(buffer: Any) -> np.ndarray:
    return buffer.as_subclass(torch.Tensor).numpy() if isinstance(buffer, torch.Tensor) else np.asarray(buffer)
