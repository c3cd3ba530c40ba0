"""What comm needs of a GPU: arrays and their addresses, additions, copies to the host, and to know what is done."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from hpcinfer.partition.tree_program import TreeProgram

Array = Any
Mark = Any


class DeviceArrays(Protocol):
    """Contiguous arrays of one GPU. What is enqueued runs on the current stream, in order. No method is collective."""

    gpu_id: str  # of the GPU; two ranks that share one have the same

    def bind(self) -> None:
        """Make this GPU the current one of the calling thread."""

    def owns(self, buffer: object) -> bool:
        """Whether this is an array of the GPU, and not one of the host."""

    def empty(self, length: int) -> Array:
        """Allocate float32, flat."""

    def flat(self, array: Array) -> Array:
        """View as one dimension."""

    def num_bytes(self, array: Array) -> int:
        """Count the bytes of an array."""

    def address(self, array: Array) -> int:
        """Say where an array begins."""

    def stream(self) -> int:
        """Handle of the current stream."""

    def is_recording(self) -> bool:
        """Whether what is enqueued is recorded in a graph, and runs later."""

    def copy(self, source: Array, target: Array) -> None:
        """Enqueue a copy between arrays of the GPU; nothing if they are the same."""

    def evaluation(
        self, program: TreeProgram, nodes: Sequence[Sequence[Array]], outs: Sequence[Array]
    ) -> Callable[[], None]:
        """Prepare a program over flat float32 arrays; each call enqueues exactly its additions, in its order.

        Args:
            program: of ranks that `nodes` are of.
            nodes: for each rank those of its nodes; they are overwritten.
            outs: for the results; none of them is one of the nodes.
        """

    def pinned(self, num_bytes: int) -> np.ndarray:
        """Allocate bytes of the host that the GPU copies from and to by itself."""

    def to_host(self, source: Array, target: np.ndarray) -> None:
        """Enqueue a copy of an array into as many pinned bytes."""

    def to_device(self, source: np.ndarray, target: Array) -> None:
        """Enqueue a copy of pinned bytes into an array of as many."""

    def mark(self) -> Mark:
        """Note what has been enqueued so far."""

    def is_reached(self, mark: Mark) -> bool:
        """Whether all that had been enqueued at a mark is done."""

    def wait(self, check: Callable[[], None], mark: Mark | None = None) -> None:
        """Wait for a mark, or for all that has been enqueued, without blocking in the driver.

        Args:
            check: called again and again meanwhile; what it raises ends the wait.
            mark: of `mark`.
        """
