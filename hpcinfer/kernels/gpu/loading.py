"""Copies from the host's memory to a device: through pinned memory, on a stream of their own, so that reading goes on.

What is read straight into pinned memory is copied as it stands; all else goes through it in pieces.
"""

import logging
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from mmap import PAGESIZE
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hpcinfer.kernels.gpu.memory import answers_memory
from hpcinfer.partition.split import align_up

logger = logging.getLogger(__name__)

ARRAYS_BYTES = 512 << 20  # of pinned memory that is read into
PIECES_BYTES = 64 << 20  # of pinned memory that all else goes through
PIECE_BYTES = 16 << 20
_LEAST_BYTES = 64 << 10  # smaller arrays are not worth a part


class Mark(Protocol):
    """A place in a stream, such as torch.cuda.Event."""

    def synchronize(self) -> None:
        """Wait until the device has come there."""


class Lane(Protocol):
    """What copies go through."""

    def pinned(self, num_bytes: int) -> np.ndarray:
        """Allocate memory that a device reads by itself, uint8."""

    def copying(self) -> AbstractContextManager[object]:
        """Have what is enqueued inside go to the stream of copies."""

    def mark(self) -> Mark:
        """Mark what has been enqueued there so far."""

    def hand_over(self, mark: Any) -> None:
        """Let the current stream wait for a mark."""


class CudaLane:
    """A stream of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def pinned(self, num_bytes: int) -> np.ndarray:
        """Allocate memory that a device reads by itself, uint8."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()

    def copying(self) -> AbstractContextManager[object]:
        """Have what is enqueued inside go to the stream of copies."""
        return torch.cuda.stream(self._stream)

    def mark(self) -> torch.cuda.Event:
        """Mark what has been enqueued there so far."""
        event = torch.cuda.Event(blocking=True)
        event.record(self._stream)
        return event

    def hand_over(self, mark: Any) -> None:
        """Let the current stream wait for a mark."""
        torch.cuda.current_stream(self._stream.device).wait_event(mark)


class PinnedRing:
    """Memory that is handed out in parts; one is used again once nobody holds it and copies out of it are done.

    Several threads may take parts. It is allocated when the first one is wanted.
    """

    def __init__(self, allocate: Callable[[int], np.ndarray], num_bytes: int) -> None:
        self._allocate, self._num_bytes = allocate, num_bytes
        self._memory = np.empty(0, np.uint8)
        self._parts: list[_Part] = []  # the oldest first
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> np.ndarray | None:
        """Hand out a part, uint8, from a page's beginning on. It waits for copies, not for holders: then it is None.

        Whoever keeps the array, or a view of it, holds the part.
        """
        size = align_up(num_bytes, PAGESIZE)
        if size > self._num_bytes:
            return None
        with self._lock:
            while (start := self._gap(size)) is None:
                oldest = next((part for part in self._parts if not part.is_held), None)
                if oldest is None:
                    return None
                oldest.wait()
                self._parts.remove(oldest)
            if not len(self._memory):
                try:
                    self._memory = self._allocate(self._num_bytes)
                except RuntimeError as error:  # of CUDA: so much may not be pinned
                    logger.warning("weights go through memory that is not pinned, more slowly: %s", error)
                    self._num_bytes = 0
                    return None
            # views of an array over a buffer refer to that array, views of another array would refer to that one
            array = np.frombuffer(self._memory.data[start : start + num_bytes], np.uint8)
            self._parts.append(_Part(start, start + size, array))
        return array

    def holds(self, array: np.ndarray) -> bool:
        """Whether an array lies in this memory."""
        memory = self._memory
        return 0 <= array.ctypes.data - memory.ctypes.data < len(memory)

    def release(self) -> None:
        """Give the memory back, unless somebody holds a part; it waits for copies."""
        with self._lock:
            if not any(part.is_held for part in self._parts):
                for part in self._parts:
                    part.wait()
                self._parts, self._memory = [], np.empty(0, np.uint8)

    def note(self, array: np.ndarray, mark: Mark) -> None:
        """Have the part in which an array lies wait for a copy."""
        place = array.ctypes.data - self._memory.ctypes.data
        with self._lock:
            next(part for part in self._parts if part.start <= place < part.stop).copies.append(mark)

    def _gap(self, size: int) -> int | None:
        """Where so many bytes are free: the lowest such place."""
        stop = 0
        for part in sorted(self._parts, key=lambda part: part.start):
            if part.start - stop >= size:
                return stop
            stop = part.stop
        return stop if stop + size <= self._num_bytes else None


class _Part:
    """A part of the ring that has been handed out."""

    def __init__(self, start: int, stop: int, array: np.ndarray) -> None:
        self.start, self.stop = start, stop
        self._array = weakref.ref(array)
        self.copies: list[Mark] = []

    @property
    def is_held(self) -> bool:
        """Whether somebody may still fill or copy it."""
        return self._array() is not None

    def wait(self) -> None:
        """Wait until all copies out of it are done."""
        for mark in self.copies:
            mark.synchronize()


class Loader:
    """Fills tensors of one device from the host's memory.

    Args:
        device: of the tensors.
        lane: what copies go through; if not given, that of a GPU, and none for tensors in the host's own memory.
    """

    def __init__(self, device: torch.device, lane: Lane | None = None) -> None:
        self._device = device
        self._lane: Lane | None = CudaLane(device) if lane is None and device.type == "cuda" else lane
        if self._lane is not None:
            self._arrays = PinnedRing(self._lane.pinned, ARRAYS_BYTES)
            self._pieces = PinnedRing(self._lane.pinned, PIECES_BYTES)

    def staging(self, num_bytes: int) -> np.ndarray:
        """Memory for what is to be copied, uint8: pinned, unless it is very small or large, or others hold too much."""
        is_pinned = self._lane is not None and _LEAST_BYTES <= num_bytes <= ARRAYS_BYTES // 2
        array = self._arrays.take(num_bytes) if is_pinned else None
        return np.empty(num_bytes, np.uint8) if array is None else array

    @answers_memory
    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate a tensor to be filled: memory that no other stream uses."""
        with self._copying():
            return torch.empty(shape, dtype=dtype, device=self._device)

    def fill(self, target: Tensor, values: np.ndarray, dtype: torch.dtype) -> None:
        """Enqueue the copy of values [units, rows, columns], whose bytes are of this type, into a tensor of that shape.

        Whoever uses the tensor calls `hand_over` before. The values may be let go.
        """
        if not values.size:
            return
        values = np.ascontiguousarray(values)
        rows = max(1, PIECE_BYTES // (values.shape[2] * values.itemsize))
        with self._copying():
            for unit, part in zip(target, values, strict=True):
                for first in range(0, len(part), rows):
                    unit[first : first + rows].copy_(self._send(part[first : first + rows]).view(dtype))

    def release(self) -> None:
        """Give pinned memory back: nothing more is to come soon."""
        if self._lane is not None:
            self._arrays.release()
            self._pieces.release()

    def hand_over(self) -> None:
        """Let the current stream wait until all that was filled so far is there; the host does not wait."""
        if self._lane is not None:
            self._lane.hand_over(self._lane.mark())

    def _copying(self) -> AbstractContextManager[object]:
        return nullcontext() if self._lane is None else self._lane.copying()

    def _send(self, piece: np.ndarray) -> Tensor:
        """Enqueue the copy of a piece to the device."""
        if self._lane is None:
            return _tensor(piece)
        pinned = self._arrays
        if not pinned.holds(piece):
            pinned, room = self._pieces, self._pieces.take(piece.nbytes)
            if room is None:
                return _tensor(piece).to(self._device)
            source, piece = piece, room.view(piece.dtype).reshape(piece.shape)
            piece[...] = source
        there = torch.from_numpy(piece).to(self._device, non_blocking=True)
        pinned.note(piece, self._lane.mark())
        return there


def _tensor(values: np.ndarray) -> Tensor:
    """The same memory as a tensor; a copy of what may not be written."""
    return torch.from_numpy(np.require(values, requirements="W"))
