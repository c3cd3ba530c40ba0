"""The kernel protocol: the dozen array functions a model needs, and the arrays they exchange.

An `Array` is opaque above this layer: only kernels allocate, read and write it, and `comm` moves its bytes.
It supports slicing along its first axis and `+`. Every implementation keeps the kernel contract: an output element is a
fixed expression of its inputs, whatever batch, position, chunk, block size or mesh it is part of.

Shape letters: T tokens in the batch (packed), S sequences, D hidden size, G grains held by this rank, U padded
units per grain (head columns, MLP columns or vocabulary ids), N query heads, K KV heads, H head size, V vocabulary,
B KV blocks, P tokens per block. N, K and G are local to the rank.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from hpcinfer.config import RopeScaling

Array = Any


@dataclass(frozen=True)
class StepInput:
    """One packed batch, as integers; the same on every rank of a replica. Sequence s owns tokens
    [query_starts[s], query_starts[s + 1]), which are the last ones of its first context_lens[s] tokens."""

    token_ids: np.ndarray  # int64 [T]
    positions: np.ndarray  # int64 [T]
    slots: np.ndarray  # int64 [T]: where K and V of each token go, block * P + offset
    query_starts: np.ndarray  # int64 [S + 1]
    context_lens: np.ndarray  # int64 [S]: keys up to and including the last query of this step
    block_tables: tuple[np.ndarray, ...]  # S arrays of block ids, int64
    logit_tokens: np.ndarray  # int64 [R]: tokens of the batch whose logits are asked for


class HeadLayout(NamedTuple):
    """Which heads of a layer this rank computes, and where they stand in its grains."""

    head_size: int
    heads_per_grain: int  # heads that a grain has room for: U = heads_per_grain * H
    grain_heads: tuple[int, ...]  # true query heads of each local grain, [G]
    kv_of_head: tuple[int, ...]  # local KV head of each local query head, [N]


class GrainStats(NamedTuple):
    """Reduced logits of R rows over the grains of a rank."""

    maxima: np.ndarray  # float32 [R, G]
    exp_sums: np.ndarray  # float32 [R, G], of exp(logit - maximum of that grain)


class Kernels(Protocol):
    """What a model may do with arrays. Weights are made once by `linear`, `vector` and `table`."""

    name: str

    def profile(self) -> dict[str, str]:
        """Describe what fixes the bits: kernel set, library versions, and the digest of a short probe."""

    def empty(self, shape: tuple[int, ...]) -> Array:
        """Allocate float32, uninitialised, contiguous."""

    def host(self, array: Array) -> np.ndarray:
        """View (or copy) an array as numpy."""

    def device(self, array: np.ndarray) -> Array:
        """View (or copy) a numpy array as Array."""

    def kv_cache(self, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, dtype: str) -> Array:
        """Allocate K and V of one layer, [2, B, P, K, H], in the cache's precision.

        Opaque: an implementation may add what it needs. Slots that were never written are never read."""

    def linear(self, grains: np.ndarray, dtype: str) -> Any:
        """Prepare a weight [G, U_out, U_in] (raw as stored; bfloat16 is uint16) for products; dtype as stored."""

    def vector(self, values: np.ndarray, dtype: str) -> Array:
        """Prepare a norm weight or bias; any shape, as stored."""

    def embed(
        self, table: Any, grain_starts: tuple[int, ...], grain_sizes: tuple[int, ...], token_ids: np.ndarray
    ) -> Array:
        """Rows of a vocabulary table [G, U, D]; zeros for ids of other ranks' grains, and never -0. Returns [T, D].

        `grain_starts` and `grain_sizes` are the first id and the true number of ids of each local grain;
        `table` is made by `linear`."""

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """x * weight / sqrt(mean(x ** 2) + eps) over the last axis."""

    def grain_linear(self, x: Array, weight: Any, bias: Array | None = None) -> Array:
        """Column-parallel: [T, D] times [G, U, D] gives [T, G, U] (+ bias [G, U]), each grain its own product."""

    def partial_linear(self, x: Array, weight: Any, spans: list[tuple[int, int]]) -> list[Array]:
        """Row-parallel: [T, G, U] and [G, D, U] give one partial sum [T, D] per tree node of this rank.

        `spans` are half-open runs of local grains; inside a node the grains are added in the tree's order."""

    def add(self, a: Array, b: Array) -> Array:
        """Elementwise sum."""

    def add_bias(self, x: Array, bias: Array) -> Array:
        """x + bias along the last axis."""

    def silu_mul(self, gate: Array, up: Array) -> Array:
        """gate * sigmoid(gate) * up."""

    def rope_table(self, max_len: int, head_size: int, theta: float, scaling: RopeScaling) -> Array:
        """Cosines and sines of every position, [max_len, 2, H / 2] (see hpcinfer.kernels.rope)."""

    def rotate_and_store(self, q: Array, k: Array, v: Array, step: StepInput, rope: Array, cache: Array) -> Array:
        """Rotate q [T, N, H] and k [T, K, H]; write k and v into the cache at `step.slots`. Returns rotated q.

        Columns i and i + H / 2 rotate together. What the cache's precision cannot hold is stored as its largest
        finite value, and NaN as 0, so that no token can spoil one that must not see it."""

    def attention(self, q: Array, step: StepInput, cache: Array, layout: HeadLayout, window: int) -> Array:
        """Causal attention over the cache, keys in tiles of 64 absolute positions. Returns [T, G, U], padded columns 0.

        `window` is the number of keys a token sees, itself included; 0 is all."""

    def split_heads(self, x: Array, layout: HeadLayout) -> Array:
        """[T, G, U] without the padded head columns: [T, N, H]."""

    def take_rows(self, x: Array, rows: np.ndarray) -> Array:
        """Rows of x."""

    def grain_stats(self, logits: np.ndarray, grain_sizes: tuple[int, ...]) -> GrainStats:
        """Maximum and exp-sum of float32 logits [R, G, U] per grain, without padded columns; -inf and 0 if none."""

    def log(self, x: np.ndarray) -> np.ndarray:
        """Natural logarithm of float32 or float64, the same bits for the same input in any array."""

    def exp(self, x: np.ndarray) -> np.ndarray:
        """Exponential in float32, the same bits for the same input in any array; 0 below -86.5."""
