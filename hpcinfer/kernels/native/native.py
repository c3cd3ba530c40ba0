"""The native kernels: numpy arrays, C functions. A CPU job that uses them never imports torch."""

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hpcinfer.config import RopeScaling
from hpcinfer.dtypes import STORAGE
from hpcinfer.kernels.fp8_weights import FP8_PRODUCTS
from hpcinfer.kernels.logarithm import log
from hpcinfer.kernels.native.library import Library
from hpcinfer.kernels.native.prepared import NativeWeights, Prepared, Table
from hpcinfer.kernels.node_memory import NodeMemory
from hpcinfer.kernels.probe import probe_digest
from hpcinfer.kernels.protocol import Changes, Draw, GrainBest, GrainStats, LayerWeights, StepInput
from hpcinfer.kernels.rope import rope_table
from hpcinfer.kernels.sampling import COLDEST, HOTTEST, RowSampling

logger = logging.getLogger(__name__)

_VERSION = "native-1"  # changes whenever a bit of a result may
_PROBED = (("float32", "float32"), ("int8", "int8"), ("int4", "bfloat16"))  # weights and caches
_PHASES = ("products", "attention", "other kernels", "sampling")  # HPC_PRODUCTS, HPC_ATTENTION, HPC_OTHER, ...
_DRAW = np.dtype("f8,i8,f8,f8,f8,i8")  # hpc_draw; the fields of Draw in their order


class NativeCache:
    """K and V of one layer."""

    def __init__(self, library: Library, struct: Any) -> None:
        self.struct, self._library = struct, library

    def memory(self) -> np.ndarray:
        """All bytes of it, for tests that fill it with garbage."""
        return np.frombuffer(self._library.ffi.buffer(self.struct.keys, self.struct.total_bytes), np.uint8)


class NativeKernels(NativeWeights, NodeMemory, RowSampling):
    """Implements `Kernels` with the C library. Several may live in one process, each with its own threads."""

    name = "native"

    def __init__(self, library: Library, threads: int = 1) -> None:
        super().__init__(library, threads)
        self._runtime = self._owned(self._lib.hpc_runtime_new(threads), self._lib.hpc_runtime_free)
        if (found := self._lib.hpc_runtime_threads(self._runtime)) < threads:
            logger.warning("%d threads instead of %d: OMP_THREAD_LIMIT, or a build without OpenMP", found, threads)
        self._steps: deque[tuple[StepInput, Prepared]] = deque(maxlen=2)  # a batch may come in halves
        self._spans: dict[tuple[tuple[int, int], ...], Any] = {}

    def profile(self) -> dict[str, str]:
        """Describe what fixes the bits: the version of the kernels, and the digest of a short probe.

        The instruction set and the number of threads do not."""
        return {"kernels": _VERSION, "device": "cpu", "probe": probe_digest(self, _PROBED), **FP8_PRODUCTS}

    def phase_seconds(self) -> dict[str, float]:
        """Seconds in array functions so far, by phase."""
        return dict(zip(_PHASES, self._ffi.unpack(self._lib.hpc_seconds(self._runtime), len(_PHASES)), strict=True))

    def bind_workers(self) -> None:
        """Bind the OpenMP team of the calling thread: what it touches first is near those that compute with it."""
        self._library.bind_workers()

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """Allocate float32, uninitialised, contiguous."""
        return np.empty(shape, np.float32)

    def zeros(self, shape: tuple[int, ...]) -> np.ndarray:
        """Allocate float32 zeros, contiguous."""
        return np.zeros(shape, np.float32)

    def host(self, array: np.ndarray) -> np.ndarray:
        """The array itself."""
        return array

    def device(self, array: np.ndarray) -> np.ndarray:
        """The array itself."""
        return array

    def kv_cache(self, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, dtype: str) -> NativeCache:
        """Allocate K and V of one layer.

        Raises:
            MemoryError: there is not enough.
        """
        struct = self._lib.hpc_cache_new(self._kind(dtype), num_blocks, block_size, num_kv_heads, head_size)
        return NativeCache(self._library, self._owned(struct, self._lib.hpc_cache_free))

    def kv_bytes(self, head_size: int, dtype: str) -> int:
        """Bytes of K and V of one token and KV head: values are padded to 16 columns, int8 has two scales."""
        columns = head_size + -(-head_size // 16) * 16
        return columns * STORAGE[dtype].itemsize + (8 if dtype == "int8" else 0)

    def rope_table(self, max_len: int, head_size: int, theta: float, scaling: RopeScaling) -> np.ndarray:
        """Cosines and sines of every position, [max_len, 2, H / 2]."""
        return rope_table(max_len, head_size, theta, scaling)

    def embed(
        self, table: Table, grain_starts: tuple[int, ...], grain_sizes: tuple[int, ...], token_ids: np.ndarray
    ) -> np.ndarray:
        """Rows of a vocabulary table; zeros for foreign ids."""
        grains, units, hidden = table.weight.values.shape
        out = self.empty((len(token_ids), hidden))
        scales = self._pointer("float[]", table.weight.scales)
        starts, sizes = (self._pointer("int64_t[]", np.array(each, np.int64)) for each in (grain_starts, grain_sizes))
        self._lib.hpc_embed(
            self._runtime, self._kind(table.weight.dtype), self._pointer("char[]", table.weight.values), scales, units,
            hidden, starts, sizes, grains, self._pointer("int64_t[]", token_ids), len(token_ids), self._floats(out),
        )  # fmt: skip
        return out

    def attention(
        self, x: np.ndarray, layer: Prepared, step: StepInput, cache: NativeCache, spans: list[tuple[int, int]],
        out: np.ndarray | None = None,
    ) -> list[np.ndarray]:  # fmt: skip
        """The attention half of a layer: one partial sum [T, D] per tree node of this rank, in `out` if given."""
        nodes = self.empty((len(spans), *x.shape)) if out is None else out
        is_done = self._lib.hpc_attention_half(
            self._runtime, layer.struct, self._step(step).struct, cache.struct, self._floats(x),
            self._span_array(spans), len(spans), self._floats(nodes),
        )  # fmt: skip
        _check_memory(is_done)
        return list(nodes)

    def mlp(
        self, x: np.ndarray, layer: Prepared, spans: list[tuple[int, int]], out: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """The MLP half of a layer: one partial sum [T, D] per tree node of this rank, in `out` if given."""
        nodes = self.empty((len(spans), *x.shape)) if out is None else out
        is_done = self._lib.hpc_mlp_half(
            self._runtime, layer.struct, self._floats(x), len(x), self._span_array(spans), len(spans),
            self._floats(nodes),
        )  # fmt: skip
        _check_memory(is_done)
        return list(nodes)

    def whole_layers(
        self, layers: Sequence[LayerWeights], caches: Sequence[NativeCache]
    ) -> Callable[[np.ndarray, StepInput], np.ndarray]:
        """Prepare one call that runs all of these layers, in place."""
        pointers = {
            "attention": self._ffi.new("hpc_attention_layer *[]", [layer.attention.struct for layer in layers]),
            "mlp": self._ffi.new("hpc_mlp_layer *[]", [layer.mlp.struct for layer in layers]),
            "caches": self._ffi.new("hpc_cache *[]", [cache.struct for cache in caches]),
            "o_biases": self._ffi.new("float *[]", [self._pointer("float[]", layer.o_bias) for layer in layers]),
            "down_biases": self._ffi.new("float *[]", [self._pointer("float[]", layer.down_bias) for layer in layers]),
        }
        sizes = {"num_layers": len(layers), "grains": layers[0].attention.struct.grains if layers else 0}
        stack = Prepared(self._ffi.new("hpc_stack *", {**sizes, **pointers}), (layers, caches, pointers))

        def run(x: np.ndarray, step: StepInput) -> np.ndarray:
            step_struct, total = self._step(step).struct, np.empty_like(x)
            memory = self._floats(x), self._floats(total)
            _check_memory(self._lib.hpc_layers(self._runtime, stack.struct, step_struct, *memory))
            return x

        return run

    def add_residual(self, x: np.ndarray, total: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        """x + (total + bias), in place."""
        self._lib.hpc_add_residual(
            self._runtime, self._floats(x), self._floats(total), self._pointer("float[]", bias), *x.shape,
            self._floats(x),
        )  # fmt: skip
        return x

    def join(self, parts: list[np.ndarray]) -> np.ndarray:
        """Concatenate along the tokens."""
        return np.concatenate(parts)

    def logits(self, x: np.ndarray, rows: np.ndarray, head: Prepared) -> np.ndarray:
        """Norm and output head of some rows: [R, G, U]."""
        num_out, grains = head.struct.weight.num_out, head.struct.grains
        out = self.empty((len(rows), grains, num_out // grains))
        is_done = self._lib.hpc_logits(
            self._runtime, head.struct, self._floats(x), self._pointer("int64_t[]", rows), len(rows), self._floats(out)
        )
        _check_memory(is_done)
        return out

    def argmax(
        self, logits: np.ndarray, grain_sizes: tuple[int, ...], changes: Mapping[int, Changes] | None = None
    ) -> GrainBest:
        """The largest true logit of each row."""
        best = GrainBest(self.empty((len(logits),)), np.empty(len(logits), np.int64))
        self._lib.hpc_argmax(
            self._runtime, self._floats(logits), self._sizes(grain_sizes), *logits.shape, self._floats(best.values),
            self._pointer("int64_t[]", best.places),
        )  # fmt: skip
        if changes:
            rows, draws = list(changes), [Draw(0.0, changes=change) for change in changes.values()]
            best.values[rows], best.places[rows] = self._drawn(logits[rows], grain_sizes, draws)
        return best

    def grain_stats(self, logits: np.ndarray, grain_sizes: tuple[int, ...]) -> GrainStats:
        """Maximum and exp-sum of logits [R, G, U] per grain."""
        stats = GrainStats(self.empty(logits.shape[:2]), self.empty(logits.shape[:2]))
        logits = np.ascontiguousarray(logits)
        self._lib.hpc_grain_stats(
            self._runtime, self._floats(logits), self._sizes(grain_sizes), *logits.shape, self._floats(stats.maxima),
            self._floats(stats.exp_sums),
        )  # fmt: skip
        return stats

    def largest(self, row: np.ndarray, count: int) -> np.ndarray:
        """Places of the largest values: value descending, place ascending."""
        places = np.empty(min(count, len(row)), np.int64)
        row = np.ascontiguousarray(row)
        self._lib.hpc_largest(
            self._runtime, self._floats(row), len(row), len(places), self._pointer("int64_t[]", places)
        )
        return places

    def draw(self, logits: np.ndarray, grain_sizes: tuple[int, ...], draws: Sequence[Draw]) -> np.ndarray:
        """Choose an id of each row of [R, G, U], rows side by side on all threads."""
        return self._drawn(logits, grain_sizes, draws).places

    def _drawn(self, logits: np.ndarray, grain_sizes: tuple[int, ...], draws: Sequence[Draw]) -> GrainBest:
        """Ids that are drawn, with their changed logits."""
        values = self.empty((len(draws),))
        rules, ids = np.array([draw[:-1] for draw in draws], _DRAW), np.empty(len(draws), np.int64)
        temperatures = rules["f0"]
        np.clip(temperatures, COLDEST, HOTTEST, out=temperatures, where=temperatures != 0)
        changes = self._changes([draw.changes for draw in draws])
        is_done = self._lib.hpc_draw_ids(
            self._runtime, self._floats(np.ascontiguousarray(logits)), self._sizes(grain_sizes), *logits.shape,
            self._pointer("hpc_draw[]", rules), changes.struct, self._pointer("int64_t[]", ids), self._floats(values),
        )  # fmt: skip
        _check_memory(is_done)
        return GrainBest(values, ids)

    def log(self, x: np.ndarray) -> np.ndarray:
        """Natural logarithm, computed in float64, in the precision of x."""
        return log(x).astype(x.dtype, copy=False)

    def exp(self, x: np.ndarray) -> np.ndarray:
        """Exponential in float32."""
        out = np.array(x, np.float32, order="C")
        self._lib.hpc_exp(self._runtime, self._floats(out), out.size)
        return out

    def _changes(self, changes: list[Changes | None]) -> Prepared:
        """Changes of rows, one behind the other; NULL where there are none."""
        some = [each for each in changes if each is not None]
        if not some:
            return Prepared(self._ffi.NULL, ())
        starts = np.cumsum([0, *(0 if each is None else len(each.places) for each in changes)])
        places, *values = (np.concatenate(field) for field in zip(*some, strict=True))
        floats = dict(zip(("biases", "factors", "penalties"), values, strict=True))
        return self._prepare("hpc_changes *", {}, starts=starts, places=places, **floats)

    def _step(self, step: StepInput) -> Prepared:
        for known, struct in self._steps:
            if known is step:
                return struct
        names = ("positions", "slots", "query_starts", "block_tables", "table_starts")
        arrays = {name: np.ascontiguousarray(getattr(step, name), np.int64) for name in names}
        sizes = {"num_tokens": len(step.positions), "num_sequences": len(step.context_lens)}
        struct = self._prepare("hpc_step *", sizes, **arrays)
        self._steps.append((step, struct))
        return struct

    def _span_array(self, spans: list[tuple[int, int]]) -> Any:
        key = tuple(spans)
        if key not in self._spans:
            self._spans[key] = self._ffi.new("int64_t[]", [bound for span in spans for bound in span])
        return self._spans[key]

    def _sizes(self, sizes: tuple[int, ...]) -> Any:
        return self._ffi.new("int64_t[]", list(sizes))

    def _floats(self, array: np.ndarray) -> Any:
        return self._ffi.from_buffer("float[]", array)


def _check_memory(is_done: int) -> None:
    if not is_done:
        raise MemoryError("the native kernels: not enough memory for what a batch takes")
