"""The reference kernels: plain torch on CPUs, one thread, the kernel contract kept by shape and by exact operations."""

import hashlib
import logging

import numpy as np
import torch
from torch import Tensor

from hpcinfer.config import RopeScaling
from hpcinfer.dtypes import to_float32
from hpcinfer.kernels import reference_math as math
from hpcinfer.kernels.protocol import GrainStats, HeadLayout, StepInput
from hpcinfer.kernels.reference_attention import AttentionPlan, attend, plan_attention
from hpcinfer.kernels.reference_products import (
    ROWS,
    GrainWeight,
    as_tiles,
    batches_are_alike,
    grain_products,
    prepare,
    rows_are_alike,
)  # fmt: skip
from hpcinfer.kernels.rope import rope_table
from hpcinfer.partition.grains import Span, tree_reduce

logger = logging.getLogger(__name__)

_CACHE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PROBED_SHAPES = ((16, 16), (64, 256), (256, 64), (512, 1024))


class ReferenceKernels:
    """Implements `Kernels` with torch. Several may live in one process, one per thread.

    Arrays of [T, G, U] are views of grain-major memory [G, T, U], so that each grain's rows are contiguous.
    """

    name = "reference"

    def __init__(self, threads: int = 1) -> None:
        if threads != 1:
            logger.warning("the reference kernels run on one thread, not %d: torch's sums change with threads", threads)
        torch.set_num_threads(1)
        self._plans: dict[tuple[HeadLayout, int, tuple[int, ...]], AttentionPlan] = {}
        self._planned_step: StepInput | None = None

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
        }

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Allocate float32, uninitialised, contiguous."""
        return torch.empty(shape)

    def host(self, array: Tensor) -> np.ndarray:
        """View an array as numpy."""
        return array.numpy()

    def device(self, array: np.ndarray) -> Tensor:
        """View a numpy array as a tensor; a read-only one is copied."""
        return torch.from_numpy(array if array.flags.writeable else array.copy())

    def kv_cache(self, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, dtype: str) -> Tensor:
        """Allocate K and V of one layer, and one more block of zeros, which stands for keys that are not there."""
        cache = torch.empty(2, num_blocks + 1, block_size, num_kv_heads, head_size, dtype=_CACHE_DTYPES[dtype])
        cache[:, num_blocks] = 0
        return cache

    def linear(self, grains: np.ndarray, dtype: str) -> GrainWeight:
        """Prepare a weight [G, U_out, U_in] for products."""
        return prepare(grains, dtype)

    def vector(self, values: np.ndarray, dtype: str) -> Tensor:
        """Prepare a norm weight or bias."""
        return torch.from_numpy(np.array(to_float32(values, dtype)))

    def embed(
        self, table: GrainWeight, grain_starts: tuple[int, ...], grain_sizes: tuple[int, ...], token_ids: np.ndarray
    ) -> Tensor:
        """Rows of a vocabulary table; zeros for foreign ids."""
        result = torch.zeros(len(token_ids), table.num_in)
        for grain, start, size in zip(table.grains, grain_starts, grain_sizes, strict=True):
            mine = np.flatnonzero((start <= token_ids) & (token_ids < start + size))
            result[mine] = grain[token_ids[mine] - start, : table.num_in]
        return result.add_(0.0)  # -0 becomes 0, as it does when ranks add their zeros

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x * weight / sqrt(mean(x ** 2) + eps) over the last axis."""
        return math.rms_norm(x, weight, eps)

    def grain_linear(self, x: Tensor, weight: GrainWeight, bias: Tensor | None = None) -> Tensor:
        """Column-parallel: [T, D] times [G, U, D] gives [T, G, U]."""
        products = grain_products(as_tiles(x.unsqueeze(0), weight.grains.shape[2]), weight)
        result = products[:, : x.shape[0], : weight.num_out]
        if bias is not None:
            result.add_(bias.unsqueeze(1))
        return result.transpose(0, 1)

    def partial_linear(self, x: Tensor, weight: GrainWeight, spans: list[tuple[int, int]]) -> list[Tensor]:
        """Row-parallel: [T, G, U] and [G, D, U] give one partial sum [T, D] per tree node of this rank."""
        products = grain_products(as_tiles(x.transpose(0, 1), weight.grains.shape[2]), weight)
        leaves = {Span(grain, grain + 1): product for grain, product in enumerate(products)}
        nodes = (tree_reduce(leaves, Span(*span), torch.add) for span in spans)
        return [node[: x.shape[0], : weight.num_out].contiguous() for node in nodes]

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """Elementwise sum."""
        return torch.add(a, b)

    def add_bias(self, x: Tensor, bias: Tensor) -> Tensor:
        """x + bias along the last axis."""
        return torch.add(x, bias)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate * sigmoid(gate) * up."""
        return math.silu_mul(gate.transpose(0, 1), up.transpose(0, 1)).transpose(0, 1)

    def rope_table(self, max_len: int, head_size: int, theta: float, scaling: RopeScaling) -> Tensor:
        """Cosines and sines of every position, [max_len, 2, H / 2]."""
        return torch.from_numpy(rope_table(max_len, head_size, theta, scaling))

    def rotate_and_store(self, q: Tensor, k: Tensor, v: Tensor, step: StepInput, rope: Tensor, cache: Tensor) -> Tensor:
        """Rotate q and k; write k and v into the cache. Returns rotated q."""
        cosine, sine = rope[torch.tensor(step.positions)].unsqueeze(2).unbind(1)
        slots, limit = torch.tensor(step.slots), torch.finfo(cache.dtype).max
        for target, values in zip(cache.flatten(1, 2), (_rotate(k, cosine, sine), v), strict=True):
            finite = values.nan_to_num(0.0, limit, -limit).clamp_(-limit, limit)
            target.index_copy_(0, slots, finite.to(cache.dtype))
        return _rotate(q, cosine, sine)

    def attention(self, q: Tensor, step: StepInput, cache: Tensor, layout: HeadLayout, window: int) -> Tensor:
        """Causal attention over the cache. Returns [T, G, U], padded columns 0."""
        num_tokens, num_grains = q.shape[0], len(layout.grain_heads)
        columns = layout.heads_per_grain * layout.head_size
        if not q.numel():
            return torch.zeros(num_tokens, num_grains, columns)
        plan = self._plan(step, layout, window, tuple(cache.shape))
        heads = attend(q.contiguous(), cache, plan, num_tokens * num_grains * layout.heads_per_grain)
        return heads.view(num_tokens, num_grains, columns)

    def _plan(self, step: StepInput, layout: HeadLayout, window: int, cache_shape: tuple[int, ...]) -> AttentionPlan:
        if step is not self._planned_step:
            self._plans, self._planned_step = {}, step
        key = (layout, window, cache_shape)
        if key not in self._plans:
            self._plans[key] = plan_attention(step, layout, window, cache_shape)
        return self._plans[key]

    def split_heads(self, x: Tensor, layout: HeadLayout) -> Tensor:
        """[T, G, U] without the padded head columns: [T, N, H]."""
        grains = [x[:, grain, : count * layout.head_size] for grain, count in enumerate(layout.grain_heads) if count]
        heads = torch.cat(grains, 1) if grains else x.new_empty(x.shape[0], 0)
        return heads.view(x.shape[0], len(layout.kv_of_head), layout.head_size)

    def take_rows(self, x: Tensor, rows: np.ndarray) -> Tensor:
        """Rows of x."""
        return x.index_select(0, torch.tensor(rows))

    def grain_stats(self, logits: np.ndarray, grain_sizes: tuple[int, ...]) -> GrainStats:
        """Maximum and exp-sum of logits [R, G, U] per grain."""
        values = torch.full(logits.shape, -torch.inf)
        for grain, size in enumerate(grain_sizes):
            values.numpy()[:, grain, :size] = logits[:, grain, :size]
        maxima = values.amax(2)
        values.sub_(maxima.masked_fill(maxima == -torch.inf, 0).unsqueeze(2))
        return GrainStats(maxima.numpy(), math.tree_sum_(math.exp_(values)).numpy().copy())

    def log(self, x: np.ndarray) -> np.ndarray:
        """Natural logarithm, computed in float64, in the precision of x."""
        return math.log(x).astype(x.dtype, copy=False)

    def exp(self, x: np.ndarray) -> np.ndarray:
        """Exponential in float32."""
        return math.exp_(torch.from_numpy(np.array(x, np.float32, order="C"))).numpy()


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
