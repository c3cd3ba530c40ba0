"""The decoder: one stage of a model, on one tp rank. Families differ only in `ModelConfig`.

Shape letters: T tokens in the batch, D hidden size, G grains of this rank, U padded units of a grain, R rows whose
logits are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from hpcinfer.comm.waiting import is_working_meanwhile
from hpcinfer.config import ModelConfig
from hpcinfer.kernels.protocol import Array, Kernels, StepInput
from hpcinfer.model.fitting import Fitting
from hpcinfer.model.halves import halves
from hpcinfer.model.shard import ShardPlan, kv_heads, vocab_ranges
from hpcinfer.model.weights_of import LayerWeights, StageWeights

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

    @property
    def is_recordable(self) -> bool:
        """Whether kernels may record sums, and repeat them. Not collective; the same on all ranks."""

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
        self._kernels, self.reducer, self._spans = kernels, reducer, reducer.spans
        self._fitting = Fitting(kernels, reducer.room)
        self._vocab = vocab_ranges(config, plan)
        self._is_alone = len(plan.run) == plan.num_grains  # no sums with others
        self._whole: tuple[list[Any], Callable[[Array, StepInput], Array] | None] = [], None  # layers, with that cache

    def forward(
        self, step: StepInput, hidden: Array | None = None, each_layer: Callable[[], None] | None = None
    ) -> Array:
        """Run one batch through the stage.

        Collective over tp.

        Args:
            step: the batch, the same on every rank of the replica.
            hidden: [T, D] of the stage before, which may be overwritten; None on the first.
            each_layer: called after each layer, unless the kernels launch all layers at once.

        Returns:
            Hidden [T, D] for the next stage; on the last, logits of the rows asked for: float32 [R, G, U], contiguous,
            where columns beyond the true size of a grain mean nothing.
        """
        cut = self._cut(step)

        def work(batch: StepInput, x: Array | None) -> Array:
            return self._layers(batch, x, cut, each_layer) if batch is step else self._layers(batch, x, [batch])

        if len(cut) == 1 and self.reducer.is_recordable:
            x = self._kernels.run_layers(step, hidden, work, self, is_alone=self._is_alone)
        else:
            x = work(step, hidden)
        return self._fitting.logits(x, step.logit_tokens, self.weights.head) if self.plan.is_last else x

    def _layers(
        self, batch: StepInput, x: Array | None, cut: list[StepInput], each_layer: Callable[[], None] | None = None
    ) -> Array:
        """Embed a batch, if this is the first stage, and run all layers. Collective over tp."""
        reducer, fitting, num_nodes = self.reducer, self._fitting, len(self._spans)
        fitting.begin()
        x = self._embed(batch) if self.plan.is_first else x
        if (run := self._whole_layers()) is not None:
            with suppress(MemoryError):  # x is as it was: half layers are computed in pieces
                return run(x, batch)
        parts = _parts(cut, x)
        for layer, cache in zip(self.weights.layers, self.cache, strict=True):
            attention, mlp = partial(self._attention, layer, cache), partial(self._mlp, layer)
            for part in parts:
                nodes = fitting.nodes(attention, self._settle(part), part.step, num_nodes)
                part.total, part.bias = reducer.start(nodes), layer.o_bias
            for part in parts:
                nodes = fitting.nodes(mlp, self._settle(part), part.step, num_nodes)
                part.total, part.bias = reducer.start(nodes), layer.down_bias
            if each_layer is not None:
                each_layer()
        settled = [self._settle(part) for part in parts]
        return settled[0] if len(settled) == 1 else self._kernels.join(settled)

    def _whole_layers(self) -> Callable[[Array, StepInput], Array] | None:
        """What runs all layers at once: all weights are there, and no messages to let move on in between."""
        layers = self.weights.layers
        is_whole = self._is_alone and self.plan.is_first and self.plan.is_last and isinstance(layers, tuple)
        if not is_whole or is_working_meanwhile():
            return None
        if self._whole[0] is not self.cache:
            self._whole = self.cache, self._kernels.whole_layers(layers, self.cache)
        return self._whole[1]

    def _attention(self, layer: LayerWeights, cache: Any, x: Array, step: StepInput, room: Array | None) -> list[Array]:
        return self._kernels.attention(x, layer.attention, step, cache, self._spans, room)

    def _mlp(self, layer: LayerWeights, x: Array, step: StepInput, room: Array | None) -> list[Array]:
        return self._kernels.mlp(x, layer.mlp, self._spans, room)

    def _cut(self, step: StepInput) -> list[StepInput]:
        """The batch, in halves where their sums are to travel behind each other's products."""
        if self._is_alone:
            return [step]
        num_bytes, cut = 4 * len(step.positions) * self.config.hidden_size, halves(step)
        if len(cut) < 2 or not self.reducer.is_worth_halving(num_bytes, min(len(each.positions) for each in cut)):
            return [step]
        return cut

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
        zeros = [self._kernels.zeros(rows.shape) for _ in self._spans[1:]]
        return self.reducer.reduce([rows, *zeros])


def _parts(cut: list[StepInput], x: Array) -> list[_Part]:
    if len(cut) == 1:
        return [_Part(cut[0], x)]
    first, second = cut
    return [_Part(first, x[: len(first.positions)]), _Part(second, x[len(first.positions) :])]
