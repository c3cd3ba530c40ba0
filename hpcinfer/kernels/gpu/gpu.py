"""The kernels of one GPU: torch tensors, Triton kernels, and torch's library where the contract is not asked for."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hpcinfer.config import RopeScaling
from hpcinfer.kernels.gpu import rows as row_kernels
from hpcinfer.kernels.gpu.arrays import GpuArrays
from hpcinfer.kernels.gpu.attention import attend, rows_of_program
from hpcinfer.kernels.gpu.codes import KINDS
from hpcinfer.kernels.gpu.graphs import Recorders, Work, graphs_of
from hpcinfer.kernels.gpu.kept import NUM_KEPT, KeptIds
from hpcinfer.kernels.gpu.memory import answers_memory
from hpcinfer.kernels.gpu.plan import PlanKey
from hpcinfer.kernels.gpu.prepared import Attention, GpuWeights, Head, Mlp, Table
from hpcinfer.kernels.gpu.probe import gpu_profile
from hpcinfer.kernels.gpu.products import Products
from hpcinfer.kernels.gpu.residual import Residuals
from hpcinfer.kernels.gpu.sampling import GpuFetch, GpuSampling
from hpcinfer.kernels.gpu.step import DeviceStep, Steps, rows_of_ids, to_device
from hpcinfer.kernels.gpu.weights import DTYPES, GpuWeight
from hpcinfer.kernels.protocol import Changes, Draw, GrainBest, GrainStats, LayerWeights, Scores, StepInput
from hpcinfer.kernels.rope import rope_table

_CACHE_DTYPES = {**DTYPES, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


class GpuKernels(GpuWeights):
    """Implements `Kernels` with Triton on one device. Reproducible ones keep the kernel contract on one type of GPU.

    Args:
        device: of all arrays.
        reproducible: whether the contract is kept; else products are the library's, and depend on the batch.
        dtype: of products; "auto" is that of the weights, and bfloat16 for quantised ones.
        graphs: whether decode steps are recorded and repeated.
        num_sharers: ranks that share the device.
    """

    name = "triton"
    while_waiting: Callable[[], None] | None = None
    num_kept_ids = NUM_KEPT

    def __init__(
        self, device: torch.device, *, reproducible: bool = True, dtype: str = "auto", graphs: bool = True,
        num_sharers: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(device, dtype)
        self.is_reproducible, self._num_sharers = reproducible, num_sharers
        _sum_in_float32()
        self._products = Products(device, reproducible)
        self._sampling, self._kept = GpuSampling(device), KeptIds(device)
        self._residuals = Residuals()
        self._steps = Steps(lambda step: DeviceStep(step, device))
        self._recorders = Recorders(graphs_of(device) if graphs else None, self._steps, device)
        self._table_rows: dict[tuple[tuple[int, ...], tuple[int, ...], int], Tensor] = {}

    def profile(self) -> dict[str, str]:
        """Describe what fixes the bits: type of GPU, versions of compilers and libraries, and the digest of a probe."""
        return gpu_profile(self, self._device, reproducible=self.is_reproducible)

    def phase_seconds(self) -> dict[str, float]:
        """Not measured: the device is not waited for."""
        return {}

    def bind_workers(self) -> None:
        """Make this device the current one of the calling thread."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def free_bytes(self) -> int | None:
        """Free memory of the GPU; None in the interpreter."""
        return None if self._device.type == "cpu" else torch.cuda.mem_get_info(self._device)[0] // self._num_sharers

    def total_bytes(self) -> int | None:
        """Memory of the GPU; None in the interpreter."""
        return None if self._device.type == "cpu" else torch.cuda.mem_get_info(self._device)[1] // self._num_sharers

    def trim(self) -> None:
        """Give what torch keeps for coming tensors back, and what weights came through."""
        self._preparer.loader.release()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def device_arrays(self) -> GpuArrays:
        """What moves these arrays between ranks."""
        return GpuArrays(self._device)

    @answers_memory
    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Allocate float32, uninitialised, contiguous."""
        return torch.empty(shape, device=self._device)

    @answers_memory
    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Allocate float32 zeros, contiguous."""
        return torch.zeros(shape, device=self._device)

    def host(self, array: Tensor) -> np.ndarray:
        """Copy an array to the host; it waits for the device, with `while_waiting` meanwhile."""
        [there] = self.fetch([array]).wait()
        return there

    @answers_memory
    def kv_cache(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, dtype: str
    ) -> row_kernels.KvCache:
        """Allocate K and V of one layer."""
        shape, kind = (num_blocks * block_size, num_kv_heads), _CACHE_DTYPES[dtype]
        keys, values = (torch.empty(*shape, head_size, dtype=kind, device=self._device) for _ in range(2))
        if kind not in KINDS:
            return row_kernels.KvCache(keys, values, None, None, block_size)
        return row_kernels.KvCache(keys, values, self.empty(shape), self.empty(shape), block_size)

    def kv_bytes(self, head_size: int, dtype: str) -> int:
        """Bytes of K and V of one token and KV head; int8 and fp8 have two scales."""
        kind = _CACHE_DTYPES[dtype]
        return 2 * head_size * kind.itemsize + (8 if kind in KINDS else 0)

    def rope_table(self, max_len: int, head_size: int, theta: float, scaling: RopeScaling) -> Tensor:
        """Cosines and sines of every position, [max_len, 2, H / 2]."""
        return self.device(rope_table(max_len, head_size, theta, scaling))

    @answers_memory
    def embed(
        self, table: Table, grain_starts: tuple[int, ...], grain_sizes: tuple[int, ...], token_ids: np.ndarray
    ) -> Tensor:
        """Rows of a vocabulary table; zeros for foreign ids."""
        key = (grain_starts, grain_sizes, table.units)
        if key not in self._table_rows:
            self._table_rows[key] = self.device(rows_of_ids(*key))
        indices = self._kept.find(self._steps.token_ids(token_ids, self._device), self._table_rows[key])
        return row_kernels.embed(table.weight.values, table.weight.scales, indices)

    def run_layers(
        self, step: StepInput, hidden: Tensor | None, work: Work, owner: object, *, is_alone: bool
    ) -> Tensor:
        """The layers of a stage; those of decode batches are recorded (hpcinfer.kernels.gpu.graphs)."""
        return self._recorders.run(step, hidden, self._residuals.around(work), owner, is_alone=is_alone)

    @answers_memory
    def attention(
        self, x: Tensor, layer: Attention, step: StepInput, cache: row_kernels.KvCache, spans: list[tuple[int, int]],
        out: Tensor | np.ndarray | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """The attention half of a layer: one partial sum [T, D] per tree node of this rank."""
        key = PlanKey(layer.groups.size, layer.window, rows_of_program(layer.qkv.dtype, cache))
        places, plan = self._steps.find(step).places, self._steps.plan(step, key)
        normed = self._residuals.norm(x, layer.norm, layer.eps, layer.qkv.normed_dtype)
        qkv = self._products.linear(normed, layer.qkv)
        q = row_kernels.rotate_and_store(qkv, places.positions, places.slots, layer.rotation, cache, layer.qkv.dtype)
        heads = attend(q, places, cache, layer.groups, plan, layer.window, layer.o.input_dtype)
        return self._sums(heads, layer.o, spans, out)

    @answers_memory
    def mlp(
        self, x: Tensor, layer: Mlp, spans: list[tuple[int, int]], out: Tensor | np.ndarray | None = None
    ) -> list[Tensor]:
        """The MLP half of a layer: one partial sum [T, D] per tree node of this rank."""
        normed = self._residuals.norm(x, layer.norm, layer.eps, layer.gate_up.normed_dtype)
        return self._sums(self._products.gated(normed, layer.gate_up, layer.down.input_dtype), layer.down, spans, out)

    def whole_layers(self, layers: Sequence[LayerWeights], caches: Sequence[object]) -> None:
        """None: layers are run half by half."""

    @answers_memory
    def add_residual(self, x: Tensor, total: Tensor, bias: Tensor | None = None) -> Tensor:
        """x + (total + bias), in place."""
        return self._residuals.add(x, total, bias)

    @answers_memory
    def join(self, parts: list[Tensor]) -> Tensor:
        """Concatenate along the tokens."""
        self._residuals.finish()
        return torch.cat(parts)

    @answers_memory
    def logits(self, x: Tensor, rows: np.ndarray, head: Head) -> Tensor:
        """Norm and output head of some rows: [R, G, U]."""
        [indices] = to_device([rows.astype(np.int32)], self._device)
        normed = row_kernels.rms_norm(x, head.norm, head.eps, head.weight.normed_dtype, indices)
        logits = self._products.linear(normed, head.weight)
        return logits.float().view(len(rows), head.num_grains, -1)

    @answers_memory
    def take(self, array: Tensor, rows: list[int]) -> Tensor:
        """Some rows of an array."""
        return self._sampling.take(array, rows)

    @answers_memory
    def join_grains(self, parts: list[Tensor]) -> Tensor:
        """Concatenate logits along their grains."""
        return torch.cat(parts, 1)

    @answers_memory
    def argmax(
        self, logits: Tensor, grain_sizes: tuple[int, ...], changes: Mapping[int, Changes] | None = None
    ) -> GrainBest:
        """The largest true logit of each row."""
        return self._sampling.best(logits, grain_sizes, changes)

    @answers_memory
    def grain_stats(self, logits: Tensor, grain_sizes: tuple[int, ...]) -> GrainStats:
        """Maximum and exp-sum of logits [R, G, U] per grain."""
        return self._sampling.stats(logits, grain_sizes)

    @answers_memory
    def draw(self, logits: Tensor, grain_sizes: tuple[int, ...], draws: Sequence[Draw]) -> Tensor:
        """Choose an id of each row of [R, G, U]."""
        return self._sampling.draw(logits, grain_sizes, draws)

    @answers_memory
    def score(self, logits: Tensor, grain_sizes: tuple[int, ...], ids: Tensor, num_top: int) -> Scores:
        """What log-probabilities of an id of each row are made of."""
        return self._sampling.score(logits, grain_sizes, ids, num_top)

    def keep_ids(self, ids: Tensor, rows: list[int]) -> None:
        """Keep ids that were chosen, for `embed` of the next batch."""
        self._kept.keep(ids, rows)

    def fetch(self, arrays: list[Tensor]) -> GpuFetch:
        """Start bringing small arrays to the host."""
        return self._sampling.fetch(arrays, self._turn)

    def _turn(self) -> None:
        if self.while_waiting is not None:
            self.while_waiting()

    def _sums(
        self, x: Tensor, weight: GpuWeight, spans: list[tuple[int, int]], out: Tensor | np.ndarray | None
    ) -> list[Tensor]:
        shape = (len(spans), len(x), weight.num_out)
        nodes = out if isinstance(out, Tensor) and out.device.type == self._device.type else self.empty(shape)
        assert nodes.shape == shape and nodes.is_contiguous(), f"{nodes.shape = } {shape = }"
        self._products.sums(x, weight, spans, nodes)
        return list(nodes)



def _sum_in_float32() -> None:
    """Let the library neither round operands of float32 nor add in the type of its operands."""
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = False
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
