"""The decoder: one stage of a model, on one tp rank. Families differ only in `ModelConfig`.

Shape letters: T tokens in the batch, D hidden size, G grains of this rank, U padded units of a grain, R rows whose
logits are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from hpcinfer.config import ModelConfig
from hpcinfer.kernels.protocol import Array, Kernels, StepInput
from hpcinfer.model.halves import halves
from hpcinfer.model.shard import ShardPlan, kv_heads, vocab_ranges
from hpcinfer.model.weights_of import StageWeights

if TYPE_CHECKING:
    from hpcinfer.comm.tree import Sum, Traffic


class Reducer(Protocol):
    """Finishes sums over grains across the tp ranks (hpcinfer.comm.tree.TreeReducer)."""

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Nodes of the tree that this rank holds whole, as runs of its local grains."""

    def room(self, shape: tuple[int, ...]) -> Array | None:
        """Memory for the next values to be reduced, if it saves a copy that they stand there."""

    def reduce(self, nodes: list[Array]) -> Array:
        """Sum over all grains, from a value per node of `spans`. Collective over tp."""

    def start(self, nodes: list[Array]) -> Sum:
        """Begin such a sum; one other may begin before `finish`. Collective over tp."""

    def finish(self, total: Sum) -> Array:
        """Wait for a sum. Collective over tp."""

    def is_worth_halving(self, num_bytes: int, least_rows: int) -> bool:
        """Whether a sum of this size is to travel in two halves, behind other work. Not collective."""

    def close(self) -> None:
        """Let go of sums that are under way: a rank has died. Not collective."""

    @property
    def traffic(self) -> Traffic:
        """What was reduced so far."""


@dataclass
class _Part:
    """Some sequences of a batch, on their way through the layers."""

    step: StepInput
    x: Array  # [T, D]
    total: Sum | None = None  # under way, to be added to x
    bias: Array | None = None  # of it


class CacheShape(NamedTuple):
    """Size and precision of a rank's KV cache."""

    num_blocks: int
    block_size: int  # tokens
    dtype: str


def allocate_cache(kernels: Kernels, config: ModelConfig, plan: ShardPlan, shape: CacheShape) -> list[Any]:
    """Allocate K and V of each layer of a stage. Not collective."""
    num_kv_heads = len(kv_heads(config, plan))
    sizes = (shape.num_blocks, shape.block_size, num_kv_heads, config.head_size)
    return [kernels.kv_cache(*sizes, shape.dtype) for _ in plan.layers]


class Stage:
    """The layers of one pp coordinate, with the grains of one tp coordinate.

    Args:
        config: of the model.
        plan: what this rank holds.
        weights: of `load_stage`, prepared by the same kernels.
        kernels: compute everything.
        reducer: finishes sums over the tp axis.
        cache: K and V of each layer, of `allocate_cache`.
    """

    def __init__(
        self, config: ModelConfig, plan: ShardPlan, weights: StageWeights, kernels: Kernels, reducer: Reducer,
        *, cache: list[Any],
    ) -> None:  # fmt: skip
        self.config, self.plan, self.weights, self.cache = config, plan, weights, cache
        self._kernels, self.reducer = kernels, reducer
        self._vocab = vocab_ranges(config, plan)

    def forward(
        self, step: StepInput, hidden: Array | None = None, each_layer: Callable[[], None] | None = None
    ) -> Array:
        """Run one batch through the stage.

        Collective over tp.

        Args:
            step: the batch, the same on every rank of the replica.
            hidden: [T, D] of the stage before, which may be overwritten; None on the first.
            each_layer: called after each layer.

        Returns:
            Hidden [T, D] for the next stage; on the last, logits of the rows asked for: float32 numpy [R, G, U],
            contiguous, where columns beyond the true size of a grain mean nothing.
        """
        kernels, reducer, spans = self._kernels, self.reducer, self.reducer.spans
        parts = self._parts(step, self._embed(step) if self.plan.is_first else hidden)
        for layer, cache in zip(self.weights.layers, self.cache, strict=True):
            for part in parts:
                x = self._settle(part)
                room = reducer.room((len(spans), *x.shape))
                nodes = kernels.attention(x, layer.attention, part.step, cache, spans, room)
                part.total, part.bias = reducer.start(nodes), layer.o_bias
            for part in parts:
                x = self._settle(part)
                room = reducer.room((len(spans), *x.shape))
                part.total, part.bias = reducer.start(kernels.mlp(x, layer.mlp, spans, room)), layer.down_bias
            if each_layer is not None:
                each_layer()
        settled = [self._settle(part) for part in parts]
        x = settled[0] if len(settled) == 1 else kernels.join(settled)
        return kernels.logits(x, step.logit_tokens, self.weights.head) if self.plan.is_last else x

    def _parts(self, step: StepInput, x: Array) -> list[_Part]:
        """The batch, in halves where their sums are to travel behind each other's products."""
        num_bytes, cut = 4 * len(step.positions) * self.config.hidden_size, halves(step)
        if len(cut) < 2 or not self.reducer.is_worth_halving(num_bytes, min(len(each.positions) for each in cut)):
            return [_Part(step, x)]
        first, second = cut
        return [_Part(first, x[: len(first.positions)]), _Part(second, x[len(first.positions) :])]

    def _settle(self, part: _Part) -> Array:
        """Wait for the sum that is under way, and add it. Collective over tp."""
        if part.total is not None:
            part.x = self._kernels.add_residual(part.x, self.reducer.finish(part.total), part.bias)
            part.total = None
        return part.x

    def _embed(self, step: StepInput) -> Array:
        starts, sizes = tuple(ids.start for ids in self._vocab), tuple(map(len, self._vocab))
        rows = self._kernels.embed(self.weights.embed, starts, sizes, step.token_ids)
        # A row is whole in one grain and zero in all others: which of our nodes carries it changes no bit.
        zeros = [self._kernels.device(np.zeros(rows.shape, np.float32)) for _ in self.reducer.spans[1:]]
        return self.reducer.reduce([rows, *zeros])
