"""What is done where there is no memory for a batch: it is computed in pieces.

No row depends on others: no bit changes. Other ranks do not notice: what is joined has the shape that they expect.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hpcinfer.errors import ConfigError
from hpcinfer.kernels.protocol import Array, Kernels, StepInput
from hpcinfer.model.halves import pieces

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

Half = Callable[[Array, StepInput, "Array | None"], list[Array]]  # of a layer: x [T, D], its batch, room for the sums


class Fitting:
    """Half layers and logits of a stage, in pieces of a batch where the whole does not fit.

    Args:
        kernels: compute them, or raise MemoryError.
        room: makes memory for the sums of a whole batch.
    """

    def __init__(self, kernels: Kernels, room: Callable[[tuple[int, ...]], Array | None]) -> None:
        self._kernels, self._room = kernels, room
        self._most_tokens: int | None = None  # of a piece of this batch; None if all were fine so far
        self._has_warned = False

    def begin(self) -> None:
        """Begin a batch: what did not fit may fit now. Not collective."""
        self._most_tokens = None

    def nodes(self, half: Half, x: Array, step: StepInput, num_nodes: int) -> list[Array]:
        """Compute half a layer: a partial sum [T, D] per node. Not collective.

        Raises:
            ConfigError: there is no memory for a single token, or for all sums.
        """
        return self._nodes(half, x, step, self._room((num_nodes, *x.shape)))

    def logits(self, x: Array, rows: np.ndarray, head: Any) -> Array:
        """Logits of some rows of x [T, D]: [R, G, U]. Not collective.

        Raises:
            ConfigError: there is no memory for a single row, or for all logits.
        """
        try:
            return self._kernels.logits(x, rows, head)
        except MemoryError:
            middle = self._cut(len(rows))
        return self._join([self.logits(x, rows[:middle], head), self.logits(x, rows[middle:], head)])

    def _nodes(self, half: Half, x: Array, step: StepInput, room: Array | None) -> list[Array]:
        if self._most_tokens is None or len(step.positions) <= self._most_tokens:
            try:
                return half(x, step, room)
            except MemoryError:  # whose traceback holds what the call has taken: the pieces come after it
                self._most_tokens = self._cut(len(step.positions))
        first, second = pieces(step)
        middle = len(first.positions)
        found = self._nodes(half, x[:middle], first, None), self._nodes(half, x[middle:], second, None)
        return [self._join(list(parts)) for parts in zip(*found, strict=True)]

    def _join(self, parts: list[Array]) -> Array:
        try:
            return self._kernels.join(parts)
        except MemoryError as error:
            raise ConfigError(
                f"no memory for what {sum(map(len, parts))} tokens come to", expected="memory beside the KV cache",
                hint="lower --kv-cache-memory or --max-num-batched-tokens",
            ) from error

    def _cut(self, count: int) -> int:
        """Half of what did not fit."""
        if count < 2:
            raise ConfigError(
                "no memory to compute one token", expected="memory beside the weights and the KV cache",
                hint="lower --kv-cache-memory",
            )  # fmt: skip
        if not self._has_warned:
            logger.warning("no memory for %d tokens at once: they are computed in pieces, more slowly", count)
        self._has_warned = True
        return count // 2
