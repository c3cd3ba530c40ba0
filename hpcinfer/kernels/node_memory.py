"""What kernels have in common whose arrays are in the node's memory: there is no device to ask or to wait for."""

from collections.abc import Callable

import numpy as np

from hpcinfer.kernels.protocol import Array, StepInput


class NodeMemory:
    """The part of `Kernels` that is the same on all CPUs."""

    is_reproducible = True
    while_waiting: Callable[[], None] | None = None
    num_kept_ids = 0

    def free_bytes(self) -> None:
        """None: what is free is for the node to say."""

    def total_bytes(self) -> None:
        """None, likewise."""

    def trim(self) -> None:
        """Nothing is kept."""

    def device_arrays(self) -> None:
        """None: any rank of the node may reach arrays."""

    def keep_ids(self, ids: Array, rows: list[int]) -> None:
        """Nothing is kept: the host knows all ids."""

    def staging(self, num_bytes: int) -> np.ndarray:
        """Memory like any other."""
        return np.empty(num_bytes, np.uint8)

    def run_layers(
        self, step: StepInput, hidden: Array | None, work: Callable[[StepInput, Array | None], Array], owner: object,
        *, is_alone: bool,
    ) -> Array:  # fmt: skip
        """work(step, hidden): nothing is recorded."""
        return work(step, hidden)
