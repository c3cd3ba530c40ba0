"""The reference kernels: plain torch on CPUs, one thread, the kernel contract kept by shape and by exact operations."""

import hashlib
import logging
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpcinfer.config import RopeScaling
from hpcinfer.dtypes import dequantise
from hpcinfer.kernels import reference_math as math
from hpcinfer.kernels.fp8_weights import FP8_PRODUCTS, without_fp8
from hpcinfer.kernels.node_memory import NodeMemory
from hpcinfer.kernels.protocol import (
    AttentionShape,
    AttentionWeights,
    HeadLayout,
    LayerWeights,
    Linear,
    MlpWeights,
    StepInput,
    Weight,
)
from hpcinfer.kernels.reference_attention import AttentionPlan, attend, plan_attention
from hpcinfer.kernels.reference_logits import ReferenceLogits
from hpcinfer.kernels.reference_products import (
    ROWS,
    GrainWeight,
    as_tiles,
    batches_are_alike,
    grain_products,
    prepare,
    rows_are_alike,
)  # fmt: skip
from hpcinfer.kernels.reference_quantised import QuantisedWeight, prepare_quantised, quantise_rows, quantised_products
from hpcinfer.kernels.rope import rope_table
from hpcinfer.partition.grains import Span, tree_reduce

logger = logging.getLogger(__name__)

# int8 keeps what its codes stand for, so that it takes the memory of float32 here
_CACHE_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.float32,
}  # fmt: skip
_PROBED_SHAPES = ((16, 16), (64, 256), (256, 64), (512, 1024))


class _Linear(NamedTuple):
    """A prepared weight, and its bias if it has one."""

    weight: GrainWeight | QuantisedWeight
    bias: Tensor | None


class _Attention(NamedTuple):
    """The attention half of a layer."""

    shape: AttentionShape
    norm: Tensor
    q: _Linear
    k: _Linear
    v: _Linear
    o: GrainWeight | QuantisedWeight
    q_norm: Tensor | None
    k_norm: Tensor | None


class _Mlp(NamedTuple):
    """The MLP half of a layer."""

    eps: float
    norm: Tensor
    gate: _Linear
    up: _Linear
    down: GrainWeight | QuantisedWeight


class _Head(NamedTuple):
    """The last norm and the output head."""

    eps: float
    norm: Tensor
    weight: GrainWeight | QuantisedWeight


class Cache(NamedTuple):
    """K and V of one layer, and a block of zeros at their end, which stands for keys that are not there."""

    values: Tensor  # [2, B + 1, P, K, H]
    is_int8: bool


class _Plans(dict[tuple[HeadLayout, int, tuple[int, ...]], AttentionPlan]):
    """Of a batch, by heads, window and shape of the cache."""


class ReferenceKernels(NodeMemory, ReferenceLogits):
    """Implements `Kernels` with torch. Several may live in one process, one per thread.

    Arrays of [T, G, U] are views of grain-major memory [G, T, U], so that each grain's rows are contiguous.
    """

    name = "reference"

    def __init__(self, threads: int = 1) -> None:
        if threads != 1:
            logger.warning("the reference kernels run on one thread, not %d: torch's sums change with threads", threads)
        torch.set_num_threads(1)
        self._plans: deque[tuple[StepInput, _Plans]] = deque(maxlen=2)  # a batch may come in halves

    def profile(self) -> dict[str, str]:
        """Describe what fixes the bits: kernel set, library versions, and the digest of a short probe."""
        is_tiled = all(rows_are_alike(*shape) for shape in _PROBED_SHAPES) and batches_are_alike(64, 64)
        return {
            "kernels": self.name,
            "device": "cpu",
            "torch": torch.__version__,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "rows_per_product": str(ROWS if is_tiled else 1),
            "probe": _probe_digest(),
            **FP8_PRODUCTS,
        }

    def bind_workers(self) -> None:
        """Nothing: torch has one pool of threads, which are not bound."""

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Allocate float32, uninitialised, contiguous."""
        return torch.empty(shape)

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Allocate float32 zeros, contiguous."""
        return torch.zeros(shape)

    def host(self, array: Tensor) -> np.ndarray:
        """View an array as numpy."""
        return array.numpy()

    def device(self, array: np.ndarray) -> Tensor:
        """View a numpy array as a tensor; a read-only one is copied."""
        return torch.from_numpy(array if array.flags.writeable else array.copy())

    def phase_seconds(self) -> dict[str, float]:
        """Not measured."""
        return {}

    def vector(self, values: np.ndarray) -> Tensor:
        """Prepare a norm weight or bias."""
        return torch.from_numpy(np.array(values, np.float32))

    def kv_cache(self, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, dtype: str) -> Cache:
        """Allocate K and V of one layer."""
        values = torch.empty(2, num_blocks + 1, block_size, num_kv_heads, head_size, dtype=_CACHE_DTYPES[dtype])
        values[:, num_blocks] = 0
        return Cache(values, dtype == "int8")

    def kv_bytes(self, head_size: int, dtype: str) -> int:
        """Bytes of K and V of one token and KV head."""
        return 2 * head_size * _CACHE_DTYPES[dtype].itemsize

    def linear(self, weight: Weight, num_in: int | None = None) -> GrainWeight | QuantisedWeight:
        """Prepare a weight [G, U_out, U_in] for products; `num_in` is U_in, if the values do not say it."""
        weight = without_fp8(weight)
        if weight.scales is None:
            return prepare(weight.values, weight.dtype)
        return prepare_quantised(weight, weight.values.shape[2] if num_in is None else num_in)

    def keeps_table(self, dtype: str) -> bool:
        """Whether `prepare_table` makes no copy."""
        return False

    def prepare_table(self, table: Weight) -> Tensor:
        """Prepare a vocabulary table [G, U, D]."""
        return torch.from_numpy(np.array(dequantise(table.values, table.dtype, table.scales)))

    def prepare_attention(self, weights: AttentionWeights, shape: AttentionShape) -> _Attention:
        """Prepare the attention half of a layer."""
        hidden, columns = len(weights.norm), shape.layout.heads_per_grain * shape.layout.head_size
        return _Attention(
            shape, self.vector(weights.norm), self._linear(weights.q, hidden), self._linear(weights.k, hidden),
            self._linear(weights.v, hidden), self.linear(weights.o, columns),
            self._optional(weights.q_norm), self._optional(weights.k_norm),
        )  # fmt: skip

    def prepare_mlp(self, weights: MlpWeights, eps: float) -> _Mlp:
        """Prepare the MLP half of a layer."""
        hidden, width = len(weights.norm), weights.up.weight.values.shape[1]
        gate, up = self._linear(weights.gate, hidden), self._linear(weights.up, hidden)
        return _Mlp(eps, self.vector(weights.norm), gate, up, self.linear(weights.down, width))

    def give_back(self, prepared: object, name: str, units: range, outs: range | None = None) -> None:
        """Nothing: the store has it."""

    def prepare_head(self, norm: np.ndarray, table: Weight, eps: float) -> _Head:
        """Prepare the last norm and the output head."""
        return _Head(eps, self.vector(norm), self.linear(table, len(norm)))

    def _linear(self, linear: Linear, num_in: int) -> _Linear:
        return _Linear(self.linear(linear.weight, num_in), self._optional(linear.bias))

    def _optional(self, values: np.ndarray | None) -> Tensor | None:
        return None if values is None else self.vector(values)

    def embed(
        self, table: Tensor, grain_starts: tuple[int, ...], grain_sizes: tuple[int, ...], token_ids: np.ndarray
    ) -> Tensor:
        """Rows of a vocabulary table; zeros for foreign ids."""
        result = torch.zeros(len(token_ids), table.shape[2])
        for grain, start, size in zip(table, grain_starts, grain_sizes, strict=True):
            mine = np.flatnonzero((start <= token_ids) & (token_ids < start + size))
            result[mine] = grain[token_ids[mine] - start]
        return result.add_(0.0)  # -0 becomes 0, as it does when ranks add their zeros

    def attention(
        self, x: Tensor, layer: _Attention, step: StepInput, cache: Cache, spans: list[tuple[int, int]],
        out: Tensor | np.ndarray | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """The attention half of a layer: one partial sum [T, D] per tree node of this rank; `out` is not used."""
        shape = layer.shape
        normed = self.rms_norm(x, layer.norm, shape.eps)
        q_TNH = self.split_heads(self.grain_linear(normed, *layer.q), shape.layout)
        k_TKH, v_TKH = self.grain_linear(normed, *layer.k), self.grain_linear(normed, *layer.v)
        if layer.q_norm is not None and layer.k_norm is not None:
            q_TNH = self.rms_norm(q_TNH, layer.q_norm, shape.eps)
            k_TKH = self.rms_norm(k_TKH, layer.k_norm, shape.eps)
        q_TNH = self.rotate_and_store(q_TNH, k_TKH, v_TKH, step, shape.rope, cache)
        return self.partial_linear(self.attend(q_TNH, step, cache, shape.layout, shape.window), layer.o, spans)

    def mlp(
        self, x: Tensor, layer: _Mlp, spans: list[tuple[int, int]], out: Tensor | np.ndarray | None = None
    ) -> list[Tensor]:
        """The MLP half of a layer: one partial sum [T, D] per tree node of this rank; `out` is not used."""
        normed = self.rms_norm(x, layer.norm, layer.eps)
        gate, up = self.grain_linear(normed, *layer.gate), self.grain_linear(normed, *layer.up)
        return self.partial_linear(self.silu_mul(gate, up), layer.down, spans)

    def whole_layers(self, layers: Sequence[LayerWeights], caches: Sequence[object]) -> None:
        """None: layers are run half by half."""

    def add_residual(self, x: Tensor, total: Tensor, bias: Tensor | None = None) -> Tensor:
        """x + (total + bias)."""
        return torch.add(x, total if bias is None else torch.add(total, bias))

    def join(self, parts: list[Tensor]) -> Tensor:
        """Concatenate along the tokens."""
        return torch.cat(parts)

    def logits(self, x: Tensor, rows: np.ndarray, head: _Head) -> Tensor:
        """Norm and output head of some rows: [R, G, U]."""
        normed = self.rms_norm(x.index_select(0, torch.tensor(rows)), head.norm, head.eps)
        return self.grain_linear(normed, head.weight).contiguous()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x * weight / sqrt(mean(x ** 2) + eps) over the last axis."""
        return math.rms_norm(x, weight, eps)

    def grain_linear(self, x: Tensor, weight: GrainWeight | QuantisedWeight, bias: Tensor | None = None) -> Tensor:
        """Column-parallel: [T, D] times [G, U, D] gives [T, G, U] (+ bias [G, U]), each grain its own product."""
        result = _products(x.unsqueeze(0), weight)
        if bias is not None:
            result.add_(bias.unsqueeze(1))
        return result.transpose(0, 1)

    def partial_linear(
        self, x: Tensor, weight: GrainWeight | QuantisedWeight, spans: list[tuple[int, int]]
    ) -> list[Tensor]:
        """Row-parallel: [T, G, U] and [G, D, U] give one partial sum [T, D] per tree node of this rank."""
        products = _products(x.transpose(0, 1), weight)
        leaves = {Span(grain, grain + 1): product for grain, product in enumerate(products)}
        nodes = (tree_reduce(leaves, Span(*span), torch.add) for span in spans)
        return [node.contiguous() for node in nodes]

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate * sigmoid(gate) * up."""
        return math.silu_mul(gate.transpose(0, 1), up.transpose(0, 1)).transpose(0, 1)

    def rope_table(self, max_len: int, head_size: int, theta: float, scaling: RopeScaling) -> Tensor:
        """Cosines and sines of every position, [max_len, 2, H / 2]."""
        return torch.from_numpy(rope_table(max_len, head_size, theta, scaling))

    def rotate_and_store(self, q: Tensor, k: Tensor, v: Tensor, step: StepInput, rope: Tensor, cache: Cache) -> Tensor:
        """Rotate q and k; write k and v into the cache. Returns rotated q.

        Columns i and i + H / 2 rotate together."""
        cosine, sine = rope[torch.tensor(step.positions)].unsqueeze(2).unbind(1)
        slots, limit = torch.tensor(step.slots), torch.finfo(cache.values.dtype).max
        for target, values in zip(cache.values.flatten(1, 2), (_rotate(k, cosine, sine), v), strict=True):
            finite = values.nan_to_num(0.0, limit, -limit).clamp_(-limit, limit)
            if cache.is_int8:
                finite = torch.mul(*quantise_rows(finite))
            target.index_copy_(0, slots, finite.to(target.dtype))
        return _rotate(q, cosine, sine)

    def attend(self, q: Tensor, step: StepInput, cache: Cache, layout: HeadLayout, window: int) -> Tensor:
        """Causal attention over the cache. Returns [T, G, U], padded columns 0."""
        num_tokens, num_grains = q.shape[0], len(layout.grain_heads)
        columns = layout.heads_per_grain * layout.head_size
        if not q.numel():
            return torch.zeros(num_tokens, num_grains, columns)
        plan = self._plan(step, layout, window, tuple(cache.values.shape))
        heads = attend(q.contiguous(), cache.values, plan, num_tokens * num_grains * layout.heads_per_grain)
        return heads.view(num_tokens, num_grains, columns)

    def _plan(self, step: StepInput, layout: HeadLayout, window: int, cache_shape: tuple[int, ...]) -> AttentionPlan:
        plans = next((plans for known, plans in self._plans if known is step), None)
        if plans is None:
            plans = _Plans()
            self._plans.append((step, plans))
        key = (layout, window, cache_shape)
        if key not in plans:
            plans[key] = plan_attention(step, layout, window, cache_shape)
        return plans[key]

    def split_heads(self, x: Tensor, layout: HeadLayout) -> Tensor:
        """[T, G, U] without the padded head columns: [T, N, H]."""
        grains = [x[:, grain, : count * layout.head_size] for grain, count in enumerate(layout.grain_heads) if count]
        heads = torch.cat(grains, 1) if grains else x.new_empty(x.shape[0], 0)
        return heads.view(x.shape[0], len(layout.kv_of_head), layout.head_size)


def _products(x: Tensor, weight: GrainWeight | QuantisedWeight) -> Tensor:
    """[G or 1, T, I] gives [G, T, O]."""
    if isinstance(weight, QuantisedWeight):
        return quantised_products(x, weight)
    products = grain_products(as_tiles(x, weight.grains.shape[2]), weight)
    return products[:, : x.shape[1], : weight.num_out]


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


def _probe_digest() -> str:
    """Hash of a few products, exponentials and norms over fixed numbers: equal where machines give equal bits."""
    digest = hashlib.sha256()
    for num_out, num_in in _PROBED_SHAPES:
        values = (np.arange(num_out * num_in, dtype=np.int64) * 7919 % 65537 / np.float32(32768) - 1).astype(np.float32)
        weight = prepare(values.reshape(1, num_out, num_in), "float32")
        rows = torch.from_numpy(values[: ROWS * num_in].reshape(1, -1, num_in).copy())
        product = grain_products(as_tiles(rows, num_in), weight)
        normed = math.rms_norm(product, torch.ones(num_out), 1e-5)
        for result in (product, normed, math.silu_mul(product, normed), math.exp_(normed)):
            digest.update(result.numpy().tobytes())
    return digest.hexdigest()[:16]
