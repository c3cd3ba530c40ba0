"""The kernel protocol: the dozen array functions a model needs, and the arrays they exchange.

An `Array` is opaque above this layer: only kernels allocate, read and write it, and `comm` moves its bytes.
It supports slicing along its first axis and `+`. Every implementation keeps the kernel contract: an output element is a
fixed expression of its inputs, whatever batch, position, chunk, block size, mesh or number of threads.

A decoder layer is two calls, each up to the point where tp ranks must add their partial sums, so that an
implementation may fuse what is between.

Shape letters: T tokens in the batch (packed), S sequences, R rows whose logits are asked for, D hidden size, G grains
held by this rank, U padded units per grain (head columns, MLP columns or vocabulary ids), N query heads, K KV heads,
H head size, V vocabulary. N, K and G are local to the rank.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from hpcinfer.config import RopeScaling

Array = Any


@dataclass(frozen=True)
class StepInput:
    """One packed batch, as integers; the same on every rank of a replica. Sequence s owns tokens
    [query_starts[s], query_starts[s + 1]), which are the last ones of its first context_lens[s] tokens.
    All arrays are int64 and contiguous."""

    token_ids: np.ndarray  # [T]
    positions: np.ndarray  # [T]
    slots: np.ndarray  # [T]: where K and V of each token go, block * block size + offset
    query_starts: np.ndarray  # [S + 1]
    context_lens: np.ndarray  # [S]: keys up to and including the last query of this step
    block_tables: np.ndarray  # block ids of all sequences, one after another
    table_starts: np.ndarray  # [S + 1]: where each sequence's blocks begin
    logit_tokens: np.ndarray  # [R]: tokens of the batch whose logits are asked for


class HeadLayout(NamedTuple):
    """Which heads of a layer this rank computes, and where they stand in its grains."""

    head_size: int
    heads_per_grain: int  # heads that a grain has room for: U = heads_per_grain * H
    grain_heads: tuple[int, ...]  # true query heads of each local grain, [G]
    kv_of_head: tuple[int, ...]  # local KV head of each local query head, [N]


class Weight(NamedTuple):
    """A matrix as stored, in units (grains or KV heads): each maps I inputs to O outputs.

    int8 is code * scale with a scale per output; int4 is code * scale with a scale per output and GROUP inputs."""

    values: np.ndarray  # [units, O, I]; bfloat16 is raw uint16; int4 is uint8 [units, O, I / 2] (hpcinfer.dtypes)
    dtype: str  # float32, float16, bfloat16, int8 or int4
    scales: np.ndarray | None = None  # int8: float32 [units, O]; int4: raw bfloat16 [units, O, I / GROUP]


class Linear(NamedTuple):
    """A weight, and its bias if it has one: float32, [units, O] if column-parallel."""

    weight: Weight
    bias: np.ndarray | None = None


class AttentionWeights(NamedTuple):
    """The attention half of a layer, as stored. The output's bias is not here: it is added to the finished sum."""

    norm: np.ndarray  # float32 [D]
    q: Linear  # units: grains
    k: Linear  # units: KV heads
    v: Linear  # units: KV heads
    o: Weight  # row-parallel; units: grains
    q_norm: np.ndarray | None = None  # float32 [H]: RMSNorm of each query head before rotary
    k_norm: np.ndarray | None = None


class AttentionShape(NamedTuple):
    """What attention needs to know besides weights."""

    layout: HeadLayout
    eps: float  # of the norms
    rope: Array  # of Kernels.rope_table
    window: int = 0  # keys that a token sees, itself included; 0 is all


class MlpWeights(NamedTuple):
    """The MLP half of a layer, as stored: down(silu(gate) * up). Units are grains."""

    norm: np.ndarray  # float32 [D]
    gate: Linear
    up: Linear
    down: Weight  # row-parallel


class GrainStats(NamedTuple):
    """Reduced logits of R rows over the grains of a rank."""

    maxima: np.ndarray  # float32 [R, G]
    exp_sums: np.ndarray  # float32 [R, G], of exp(logit - maximum of that grain)


class GrainBest(NamedTuple):
    """The largest logit of R rows over the grains of a rank."""

    values: np.ndarray  # float32 [R]; -inf where there are no ids, or only NaN
    places: np.ndarray  # int64 [R]: index among the true ids of these grains; the lowest of equals


class Kernels(Protocol):
    """What a model may do with arrays. Weights are prepared once; prepared ones are opaque."""

    name: str

    def profile(self) -> dict[str, str]:
        """Describe what fixes the bits: kernel set, library versions, and the digest of a short probe."""

    def phase_seconds(self) -> dict[str, float]:
        """Seconds in array functions so far, by phase: products, attention, other kernels; empty if not measured."""

    def bind_workers(self) -> None:
        """Bind threads that work for the calling one to CPUs, as those of the thread that has built the kernels are."""

    def free_bytes(self) -> int | None:
        """Free memory of the device that only this rank uses; None if arrays are in the node's memory."""

    def empty(self, shape: tuple[int, ...]) -> Array:
        """Allocate float32, uninitialised, contiguous."""

    def host(self, array: Array) -> np.ndarray:
        """View (or copy) an array as numpy."""

    def device(self, array: np.ndarray) -> Array:
        """View (or copy) a numpy array as Array."""

    def vector(self, values: np.ndarray) -> Array:
        """Prepare a float32 norm weight or bias."""

    def kv_cache(self, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, dtype: str) -> Any:
        """Allocate K and V of one layer, in the cache's precision: float32, bfloat16, float16 or int8.

        Slots that were never written are never read. int8 has a scale per token and KV head, for K and for V."""

    def kv_bytes(self, head_size: int, dtype: str) -> int:
        """Bytes of K and V of one token and KV head in the cache, padding and scales included."""

    def rope_table(self, max_len: int, head_size: int, theta: float, scaling: RopeScaling) -> Array:
        """Cosines and sines of every position, [max_len, 2, H / 2] (see hpcinfer.kernels.rope)."""

    def keeps_table(self, dtype: str) -> bool:
        """Whether `prepare_table` goes on to use the memory of a table of this type, and makes no copy."""

    def prepare_table(self, table: Weight) -> Any:
        """Prepare a vocabulary table [G, U, D] for `embed`."""

    def prepare_attention(self, weights: AttentionWeights, shape: AttentionShape) -> Any:
        """Prepare the attention half of a layer."""

    def prepare_mlp(self, weights: MlpWeights, eps: float) -> Any:
        """Prepare the MLP half of a layer."""

    def prepare_head(self, norm: np.ndarray, table: Weight, eps: float) -> Any:
        """Prepare the last norm and the output head, [G, U, D]."""

    def give_back(self, prepared: Any, name: str, units: range, outs: range | None = None) -> Weight | None:
        """Give back units of a prepared weight, unquantised ones as float32; the source of a rank that refills.

        Args:
            prepared: of one of the four above.
            name: as in the store: embed_tokens, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head.
            units: of those that it was prepared from, counted from 0.
            outs: outputs of each unit; all if not given.

        Returns:
            None if these kernels do not keep it in a form that can be given back.
        """

    def embed(
        self, table: Any, grain_starts: tuple[int, ...], grain_sizes: tuple[int, ...], token_ids: np.ndarray
    ) -> Array:
        """Rows of a vocabulary table; zeros for ids of other ranks' grains, and never -0. Returns [T, D].

        `grain_starts` and `grain_sizes` are the first id and the true number of ids of each local grain."""

    def attention(
        self, x: Array, layer: Any, step: StepInput, cache: Any, spans: list[tuple[int, int]],
        out: Array | None = None,
    ) -> list[Array]:  # fmt: skip
        """Norm, q k v, rotary, K and V into the cache, causal attention, output product of x [T, D].

        Returns one partial sum [T, D] per tree node of this rank: `spans` are half-open runs of local grains, inside
        which grains are added in the tree's order. Keys are walked in tiles of 64 absolute positions. What the
        cache's precision cannot hold is stored as its largest finite value, and NaN as 0, so that no token can spoil
        one that must not see it. `out` [nodes, T, D], contiguous, is where the sums may be written, which saves a copy
        if it is where other ranks read."""

    def mlp(self, x: Array, layer: Any, spans: list[tuple[int, int]], out: Array | None = None) -> list[Array]:
        """Norm, gate, up, SiLU, down of x [T, D]: one partial sum [T, D] per tree node of this rank; `out` as above."""

    def add_residual(self, x: Array, total: Array, bias: Array | None = None) -> Array:
        """x + (total + bias), [T, D]; may overwrite x."""

    def join(self, parts: list[Array]) -> Array:
        """Concatenate [T, D] along their tokens."""

    def logits(self, x: Array, rows: np.ndarray, head: Any) -> np.ndarray:
        """Norm and output head of some rows of x [T, D]: float32 numpy [R, G, U], contiguous.

        Columns beyond the true size of a grain mean nothing."""

    def argmax(self, logits: np.ndarray, grain_sizes: tuple[int, ...]) -> GrainBest:
        """The largest true logit of each row of [R, G, U]."""

    def grain_stats(self, logits: np.ndarray, grain_sizes: tuple[int, ...]) -> GrainStats:
        """Maximum and exp-sum of float32 logits [R, G, U] per grain, without padded columns; -inf and 0 if none."""

    def largest(self, row: np.ndarray, count: int) -> np.ndarray:
        """Places int64 of the `count` largest values of float32 [V]: value descending, place ascending."""

    def log(self, x: np.ndarray) -> np.ndarray:
        """Natural logarithm of float32 or float64, the same bits for the same input in any array."""

    def exp(self, x: np.ndarray) -> np.ndarray:
        """Exponential in float32, the same bits for the same input in any array; 0 below -86.5."""
