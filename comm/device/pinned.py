"""Pinned memory of the host, kept and used again: it is slow to get."""

import numpy as np

from hpcinfer.comm.device.arrays import DeviceArrays, Mark

_LEAST_BYTES = 1 << 16


class PinnedMemory:
    """Blocks whose sizes are powers of two. Not collective."""

    def __init__(self, arrays: DeviceArrays) -> None:
        self._arrays = arrays
        self._free: list[np.ndarray] = []
        self._used: list[tuple[Mark, np.ndarray]] = []  # by copies that may not be done

    def take(self, num_bytes: int) -> np.ndarray:
        """Get a block of at least so many bytes: a free one that fits best, else a new one instead of the largest."""
        self._collect()
        fitting = [i for i, block in enumerate(self._free) if len(block) >= num_bytes]
        if fitting:
            return self._free.pop(min(fitting, key=lambda i: len(self._free[i])))
        if self._free:
            self._free.pop(max(range(len(self._free)), key=lambda i: len(self._free[i])))
        return self._arrays.pinned(1 << (max(num_bytes, _LEAST_BYTES) - 1).bit_length())

    def give(self, block: np.ndarray, mark: Mark) -> None:
        """Give a block back; it is in use until the mark is reached."""
        self._used.append((mark, block))

    def _collect(self) -> None:
        is_free = [self._arrays.is_reached(mark) for mark, _ in self._used]
        self._free += [block for (_, block), free in zip(self._used, is_free, strict=True) if free]
        self._used = [each for each, free in zip(self._used, is_free, strict=True) if not free]
