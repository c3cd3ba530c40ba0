"""Arrays of the host, as sums use them: what hpcinfer.comm.device.arrays says of those of a GPU, for numpy."""

import numpy as np

from hpcinfer.comm.node.library import evaluation
from hpcinfer.comm.protocol import Buffer


class HostArrays:
    """Contiguous float32 arrays. Everything is done at once. No method is collective."""

    piece = 15 * 1024  # floats of a message: what Open MPI and MPICH send over TCP without asking first (64 KiB)
    evaluation = staticmethod(evaluation)

    def flat(self, array: Buffer) -> np.ndarray:
        """View as one dimension; tensors of the host, too."""
        return np.asarray(array).reshape(-1)

    def empty(self, length: int) -> np.ndarray:
        """Allocate float32, flat."""
        return np.empty(length, np.float32)

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy."""
        target[:] = source

    def is_recording(self) -> bool:
        """Never."""
        return False
