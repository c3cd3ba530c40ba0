"""The decoder: one stage of a model, on one tp rank. Families differ only in `ModelConfig`.

Shape letters: T tokens in the batch, D hidden size, G grains of this rank, U padded units of a grain, N query heads,
K KV heads, H head size, R rows whose logits are asked for; N, K and G are local to the rank.
"""

from typing import NamedTuple, Protocol

import numpy as np

from hpcinfer.config import ModelConfig
from hpcinfer.kernels.protocol import Array, Kernels, StepInput
from hpcinfer.model.shard import ShardPlan, head_layout, kv_heads, vocab_ranges
from hpcinfer.model.weights_of import LayerWeights, StageWeights


class Reducer(Protocol):
    """Finishes sums over grains across the tp ranks (hpcinfer.comm.tree.TreeReducer)."""

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Nodes of the tree that this rank holds whole, as runs of its local grains."""

    def reduce(self, nodes: list[Array]) -> Array:
        """Sum over all grains, from a value per node of `spans`. Collective over tp."""


class CacheShape(NamedTuple):
    """Size and precision of a rank's KV cache."""

    num_blocks: int
    block_size: int  # tokens
    dtype: str


def allocate_cache(kernels: Kernels, config: ModelConfig, plan: ShardPlan, shape: CacheShape) -> list[Array]:
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
        max_len: positions that may occur.
    """

    def __init__(
        self, config: ModelConfig, plan: ShardPlan, weights: StageWeights, kernels: Kernels, reducer: Reducer,
        *, cache: list[Array], max_len: int,
    ) -> None:  # fmt: skip
        self.config, self.plan, self.weights, self.cache = config, plan, weights, cache
        self._kernels, self._reducer = kernels, reducer
        self._layout = head_layout(config, plan)
        self._rope = kernels.rope_table(max_len, config.head_size, config.rope_theta, config.rope_scaling)
        self._windows = config.windows or (0,) * config.num_layers

    def forward(self, step: StepInput, hidden: Array | None = None) -> Array:
        """Run one batch through the stage.

        Collective over tp.

        Args:
            step: the batch, the same on every rank of the replica.
            hidden: [T, D] of the stage before; None on the first.

        Returns:
            Hidden [T, D] for the next stage; on the last, logits of the rows asked for: float32 numpy [R, G, U],
            contiguous, where columns beyond the true size of a grain mean nothing.
        """
        x = self._embed(step) if self.plan.is_first else hidden
        for i, layer in enumerate(self.weights.layers):
            x = self._attention(x, layer, step, i)
            x = self._mlp(x, layer)
        return self._logits(x, step) if self.plan.is_last else x

    def _embed(self, step: StepInput) -> Array:
        ranges = vocab_ranges(self.config, self.plan)
        starts, sizes = tuple(ids.start for ids in ranges), tuple(map(len, ranges))
        rows = self._kernels.embed(self.weights.embed, starts, sizes, step.token_ids)
        # A row is whole in one grain and zero in all others: which of our nodes carries it changes no bit.
        zeros = [self._kernels.device(np.zeros(rows.shape, np.float32)) for _ in self._reducer.spans[1:]]
        return self._reducer.reduce([rows, *zeros])

    def _attention(self, x: Array, layer: LayerWeights, step: StepInput, index: int) -> Array:
        kernels, eps, cache = self._kernels, self.config.rms_norm_eps, self.cache[index]
        normed = kernels.rms_norm(x, layer.input_norm, eps)
        q_TNH = kernels.split_heads(kernels.grain_linear(normed, *layer.q), self._layout)
        k_TKH = kernels.grain_linear(normed, *layer.k)
        v_TKH = kernels.grain_linear(normed, *layer.v)
        if layer.q_norm is not None and layer.k_norm is not None:
            q_TNH = kernels.rms_norm(q_TNH, layer.q_norm, eps)
            k_TKH = kernels.rms_norm(k_TKH, layer.k_norm, eps)
        q_TNH = kernels.rotate_and_store(q_TNH, k_TKH, v_TKH, step, self._rope, cache)
        window = self._windows[self.plan.layers[index]]
        heads_TGU = kernels.attention(q_TNH, step, cache, self._layout, window)
        return kernels.add(x, self._row_parallel(heads_TGU, *layer.o))

    def _mlp(self, x: Array, layer: LayerWeights) -> Array:
        kernels = self._kernels
        normed = kernels.rms_norm(x, layer.post_norm, self.config.rms_norm_eps)
        gate_TGU = kernels.grain_linear(normed, *layer.gate)
        up_TGU = kernels.grain_linear(normed, *layer.up)
        return kernels.add(x, self._row_parallel(kernels.silu_mul(gate_TGU, up_TGU), *layer.down))

    def _row_parallel(self, x_TGU: Array, weight: Array, bias: Array | None) -> Array:
        nodes = self._kernels.partial_linear(x_TGU, weight, self._reducer.spans)
        total = self._reducer.reduce(nodes)
        return total if bias is None else self._kernels.add_bias(total, bias)

    def _logits(self, x: Array, step: StepInput) -> np.ndarray:
        rows = self._kernels.take_rows(x, step.logit_tokens)
        normed = self._kernels.rms_norm(rows, self.weights.norm, self.config.rms_norm_eps)
        logits = self._kernels.grain_linear(normed, self.weights.head)
        return np.ascontiguousarray(self._kernels.host(logits))
