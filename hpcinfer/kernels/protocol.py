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

from collections.abc import Callable, Mapping, Sequence
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

    token_ids: np.ndarray  # [T]; below 0: -1 - row of an id that `Kernels.keep_ids` keeps
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

    int8 and float8_e4m3 are code * scale with a scale per output; int4 with a scale per output and GROUP inputs."""

    values: np.ndarray  # [units, O, I], raw where numpy lacks the type (hpcinfer.dtypes); int4: uint8 [units, O, I / 2]
    dtype: str  # float32, float16, bfloat16, int8, float8_e4m3 or int4
    scales: np.ndarray | None = None  # int8, float8_e4m3: float32 [units, O]; int4: raw bfloat16 [units, O, I / GROUP]


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


class LayerWeights(NamedTuple):
    """One decoder layer, prepared."""

    attention: Any  # of Kernels.prepare_attention
    o_bias: Array | None  # added once to the finished sum
    mlp: Any  # of Kernels.prepare_mlp
    down_bias: Array | None


class GrainStats(NamedTuple):
    """Reduced logits of R rows over the grains of a rank."""

    maxima: Array  # float32 [R, G]
    exp_sums: Array  # float32 [R, G], of exp(logit - maximum of that grain)


class GrainBest(NamedTuple):
    """The largest logit of R rows over the grains of a rank."""

    values: Array  # float32 [R]; -inf where there are no ids, or only NaN
    places: Array  # int64 [R]: index among the true ids of these grains; the lowest of equals


class Changes(NamedTuple):
    """What becomes of C logits of a row, in float32: x + bias, that divided by the factor if it is positive, else
    multiplied by it, and that minus the penalty."""

    places: np.ndarray  # int64 [C], ascending: index among the true ids of these grains
    biases: np.ndarray  # float32 [C]; -inf forbids
    factors: np.ndarray  # float32 [C]
    penalties: np.ndarray  # float32 [C]


class Draw(NamedTuple):
    """How the next id of a row is chosen; the names are those of `SamplingParams`."""

    temperature: float  # 0 takes the largest logit
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    u: float = 0.0  # from [0, 1): where in the distribution
    known_id: int = -1  # the id itself, where none is to be chosen
    changes: Changes | None = None  # of the logits


class Scores(NamedTuple):
    """What log-probabilities of R rows are made of."""

    log_sums: Array  # float64 [R]: log of the sum of exponentials
    values: Array  # float32 [R]: logit of the id that is asked for
    top_ids: Array  # int64 [R, N]: of the largest logits, highest first, then lowest id
    top_values: Array  # float32 [R, N]


class Fetch(Protocol):
    """Arrays on their way to the host."""

    is_late: bool  # whether a device may still compute them; the same for all fetches of a kernel set

    def wait(self) -> list[np.ndarray]:
        """Wait until they are there, with `while_waiting` meanwhile; at once if they have been waited for."""


class Kernels(Protocol):
    """What a model may do with arrays. Weights are prepared once; prepared ones are opaque.

    Array functions raise MemoryError where there is no memory for a batch; there may be for a part of it."""

    name: str
    is_reproducible: bool  # whether the contract is kept; only kernels of GPUs may be told not to
    while_waiting: Callable[[], None] | None  # called while a device is waited for; raises where a rank has died
    num_kept_ids: int  # rows that `keep_ids` has room for; 0 where the host knows all ids at once

    def profile(self) -> dict[str, str]:
        """Describe what fixes the bits: kernel set, library versions, and the digest of a short probe."""

    def phase_seconds(self) -> dict[str, float]:
        """Seconds in array functions so far, by phase; empty if not measured.

        The phases are products, attention, other kernels, sampling."""

    def bind_workers(self) -> None:
        """Bind threads that work for the calling one to CPUs, as those of the thread that has built the kernels are."""

    def free_bytes(self) -> int | None:
        """Free memory of the device, or this rank's part of it; None if arrays are in the node's memory."""

    def total_bytes(self) -> int | None:
        """All memory of the device, or this rank's part of it; None if arrays are in the node's memory."""

    def trim(self) -> None:
        """Give memory that no array uses any more back to the device."""

    def device_arrays(self) -> Any | None:
        """What moves arrays in and out of a device's memory (hpcinfer.comm.device); None if they are in the node's."""

    def empty(self, shape: tuple[int, ...]) -> Array:
        """Allocate float32, uninitialised, contiguous."""

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """Allocate float32 zeros, contiguous."""

    def host(self, array: Array) -> np.ndarray:
        """View (or copy) an array as numpy."""

    def device(self, array: np.ndarray) -> Array:
        """View (or copy) a numpy array as Array."""

    def vector(self, values: np.ndarray) -> Array:
        """Prepare a float32 norm weight or bias."""

    def kv_cache(self, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, dtype: str) -> Any:
        """Allocate K and V of one layer, in the cache's precision: float32, bfloat16, float16, int8; on GPUs also fp8.

        Slots that were never written are never read. int8 and fp8 (e4m3) have a scale per token and KV head, for K and
        for V."""

    def kv_bytes(self, head_size: int, dtype: str) -> int:
        """Bytes of K and V of one token and KV head in the cache, padding and scales included."""

    def staging(self, num_bytes: int) -> np.ndarray:
        """Give memory, uint8, from which `prepare_...` copies fast; its holder lets go of it once that is called.

        Any thread may ask; nobody waits for other holders."""

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

        `grain_starts` and `grain_sizes` are the first id and the true number of ids of each local grain. Ids below 0
        stand for those that are kept (see `StepInput`)."""

    def run_layers(
        self, step: StepInput, hidden: Array | None, work: Callable[[StepInput, Array | None], Array], owner: object,
        *, is_alone: bool,
    ) -> Array:  # fmt: skip
        """work(step, hidden), or the same from a recording of what it launched before for a batch like this one.

        `work` may be given another batch, of more tokens, than is asked for; all else that it uses must be the same
        whenever the owner is, with which recordings end. `is_alone` says whether no other rank does the same now."""

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

    def whole_layers(
        self, layers: Sequence[LayerWeights], caches: Sequence[Any]
    ) -> Callable[[Array, StepInput], Array] | None:
        """Prepare what runs whole layers one after another, on a rank that holds all grains: `attention`,
        `add_residual`, `mlp` and `add_residual` of each, of x [T, D], which may be overwritten.

        None if these kernels run layers half by half."""

    def add_residual(self, x: Array, total: Array, bias: Array | None = None) -> Array:
        """x + (total + bias), [T, D]; may overwrite x."""

    def join(self, parts: list[Array]) -> Array:
        """Concatenate [T, D] along their tokens."""

    def logits(self, x: Array, rows: np.ndarray, head: Any) -> Array:
        """Norm and output head of some rows of x [T, D]: float32 [R, G, U], contiguous.

        Columns beyond the true size of a grain mean nothing."""

    def take(self, array: Array, rows: list[int]) -> Array:
        """Some rows of an array of any type, in this order."""

    def join_grains(self, parts: list[Array]) -> Array:
        """Concatenate logits [R, G, U] along their grains."""

    def argmax(
        self, logits: Array, grain_sizes: tuple[int, ...], changes: Mapping[int, Changes] | None = None
    ) -> GrainBest:
        """The largest true logit of each row of [R, G, U], some of which are changed first."""

    def grain_stats(self, logits: Array, grain_sizes: tuple[int, ...]) -> GrainStats:
        """Maximum and exp-sum of float32 logits [R, G, U] per grain, without padded columns; -inf and 0 if none."""

    def draw(self, logits: Array, grain_sizes: tuple[int, ...], draws: Sequence[Draw]) -> Array:
        """Choose an id int64 of each row of [R, G, U] over all grains: temperature, min_p, top_k, top_p, in this order.

        Ids are ordered by logit descending, then ascending; all ids, where neither top_k nor top_p is asked for, by
        themselves. The first one is taken at which the sum of weights exceeds u of the whole. NaN counts as -inf."""

    def score(self, logits: Array, grain_sizes: tuple[int, ...], ids: Array, num_top: int) -> Scores:
        """What log-probabilities of an id int64 of each row of [R, G, U] over all grains are made of, and of the most
        likely ones: all ids, if there are fewer than `num_top`."""

    def keep_ids(self, ids: Array, rows: list[int]) -> None:
        """Keep ids int64 that were chosen, each at a row (ascending), for `embed` of the next batch.

        Without waiting for them. Rows that are not given keep what they have."""

    def fetch(self, arrays: list[Array]) -> Fetch:
        """Start bringing small arrays to the host, without waiting for them."""
