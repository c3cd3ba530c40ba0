"""The kernels of one GPU: torch tensors, Triton kernels, and torch's library where the contract is not asked for."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpcinfer.config import RopeScaling
from hpcinfer.errors import ConfigError
from hpcinfer.kernels.gpu import rows as row_kernels
from hpcinfer.kernels.gpu.attention import attend, rows_of_program
from hpcinfer.kernels.gpu.plan import HeadGroups, group_heads
from hpcinfer.kernels.gpu.probe import gpu_profile
from hpcinfer.kernels.gpu.products import Products
from hpcinfer.kernels.gpu.step import DeviceStep, to_device
from hpcinfer.kernels.gpu.weights import DTYPES, GpuWeight, Preparer, give_back
from hpcinfer.kernels.parts import Part, side_by_side
from hpcinfer.kernels.protocol import (
    AttentionShape,
    AttentionWeights,
    GrainBest,
    GrainStats,
    HeadLayout,
    MlpWeights,
    StepInput,
    Weight,
)
from hpcinfer.kernels.reference import ReferenceKernels
from hpcinfer.kernels.rope import rope_table

_CACHE_DTYPES = {**DTYPES, "int8": torch.int8}


class _Attention(NamedTuple):
    """The attention half of a layer."""

    norm: Tensor
    eps: float
    window: int
    qkv: GpuWeight
    o: GpuWeight
    rotation: row_kernels.Rotation
    groups: HeadGroups
    parts: dict[str, Part]


class _Mlp(NamedTuple):
    """The MLP half of a layer."""

    norm: Tensor
    eps: float
    gate_up: GpuWeight
    down: GpuWeight
    parts: dict[str, Part]


class _Head(NamedTuple):
    """The last norm and the output head."""

    norm: Tensor
    eps: float
    weight: GpuWeight
    num_grains: int
    parts: dict[str, Part]


class _Table(NamedTuple):
    """A vocabulary table."""

    weight: GpuWeight
    parts: dict[str, Part]
    units: int  # rows of a grain


class GpuKernels:
    """Implements `Kernels` with Triton on one device. Reproducible ones keep the kernel contract on one type of GPU.

    Args:
        device: of all arrays.
        reproducible: whether the contract is kept; else products are the library's, and depend on the batch.
        dtype: of products; "auto" is that of the weights, and bfloat16 for quantised ones.
    """

    name = "triton"

    def __init__(self, device: torch.device, *, reproducible: bool = True, dtype: str = "auto") -> None:
        if dtype not in ("auto", *DTYPES):
            raise ConfigError(f"products in {dtype!r}", expected=f"auto, {', '.join(DTYPES)}")
        self._device, self._reproducible = device, reproducible
        _sum_in_float32()
        self._preparer, self._products = Preparer(device, dtype), Products(device, reproducible)
        self._host = ReferenceKernels()  # for what is done with logits, which are on the host
        self._steps: tuple[DeviceStep, ...] = ()  # the last ones: halves of a batch take turns
        self._groups: dict[HeadLayout, HeadGroups] = {}

    def profile(self) -> dict[str, str]:
        """Describe what fixes the bits: type of GPU, versions of compilers and libraries, and the digest of a probe."""
        return gpu_profile(self, self._device, reproducible=self._reproducible)

    def phase_seconds(self) -> dict[str, float]:
        """Not measured: the device is not waited for."""
        return {}

    def bind_workers(self) -> None:
        """Make this device the current one of the calling thread."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def free_bytes(self) -> int | None:
        """Free memory of the GPU; None in the interpreter."""
        return None if self._device.type == "cpu" else torch.cuda.mem_get_info(self._device)[0]

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Allocate float32, uninitialised, contiguous."""
        return torch.empty(shape, device=self._device)

    def host(self, array: Tensor) -> np.ndarray:
        """Copy an array to the host; it waits for the device."""
        return array.cpu().numpy()

    def device(self, array: np.ndarray) -> Tensor:
        """Copy a numpy array to the device."""
        return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(self._device, copy=True)

    def vector(self, values: np.ndarray) -> Tensor:
        """Prepare a float32 norm weight or bias."""
        return self.device(np.asarray(values, np.float32))

    def kv_cache(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, dtype: str
    ) -> row_kernels.KvCache:
        """Allocate K and V of one layer."""
        shape, kind = (num_blocks * block_size, num_kv_heads), _CACHE_DTYPES[dtype]
        keys, values = (torch.empty(*shape, head_size, dtype=kind, device=self._device) for _ in range(2))
        if dtype != "int8":
            return row_kernels.KvCache(keys, values, None, None, block_size)
        return row_kernels.KvCache(keys, values, self.empty(shape), self.empty(shape), block_size)

    def kv_bytes(self, head_size: int, dtype: str) -> int:
        """Bytes of K and V of one token and KV head; int8 has two scales."""
        return 2 * head_size * _CACHE_DTYPES[dtype].itemsize + (8 if dtype == "int8" else 0)

    def rope_table(self, max_len: int, head_size: int, theta: float, scaling: RopeScaling) -> Tensor:
        """Cosines and sines of every position, [max_len, 2, H / 2]."""
        return self.device(rope_table(max_len, head_size, theta, scaling))

    def keeps_table(self, dtype: str) -> bool:
        """Never: the table is copied to the device."""
        return False

    def prepare_table(self, table: Weight) -> _Table:
        """Prepare a vocabulary table [G, U, D]."""
        weight, units = self._preparer.table(table), table.values.shape[1]
        parts = {} if table.dtype == "int4" else {"embed_tokens": Part(weight, units)}
        return _Table(weight, parts, units)

    def prepare_attention(self, weights: AttentionWeights, shape: AttentionShape) -> _Attention:
        """Prepare the attention half of a layer: q, k and v side by side."""
        inputs, groups = (weights.q, weights.k, weights.v), self._group_heads(shape.layout)
        qkv = self._preparer.columns([each.weight for each in inputs], [each.bias for each in inputs])
        o = self._preparer.rows(weights.o)
        q_norm, k_norm = (None if norm is None else self.vector(norm) for norm in (weights.q_norm, weights.k_norm))
        rotation = row_kernels.Rotation(shape.rope, q_norm, k_norm, shape.eps, groups.head_columns, groups.num_columns)
        parts = side_by_side(qkv, ("q_proj", "k_proj", "v_proj"), [each.weight for each in inputs])
        parts["o_proj"] = Part(o, o.num_out, is_row=True)
        return _Attention(self.vector(weights.norm), shape.eps, shape.window, qkv, o, rotation, groups, parts)

    def prepare_mlp(self, weights: MlpWeights, eps: float) -> _Mlp:
        """Prepare the MLP half of a layer: gate and up side by side."""
        inputs = (weights.gate, weights.up)
        gate_up = self._preparer.columns([each.weight for each in inputs], [each.bias for each in inputs])
        down = self._preparer.rows(weights.down)
        parts = side_by_side(gate_up, ("gate_proj", "up_proj"), [each.weight for each in inputs])
        parts["down_proj"] = Part(down, down.num_out, is_row=True)
        return _Mlp(self.vector(weights.norm), eps, gate_up, down, parts)

    def prepare_head(self, norm: np.ndarray, table: Weight, eps: float) -> _Head:
        """Prepare the last norm and the output head, [G, U, D]."""
        weight = self._preparer.columns([table])
        parts = {"lm_head": Part(weight, table.values.shape[1])}
        return _Head(self.vector(norm), eps, weight, table.values.shape[0], parts)

    def give_back(
        self, prepared: _Attention | _Mlp | _Head | _Table, name: str, units: range, outs: range | None = None
    ) -> Weight | None:
        """Units of a prepared weight; None of an int4 vocabulary table, which is kept as float32."""
        part = prepared.parts.get(name)
        return None if part is None else give_back(part, units, outs)

    def embed(
        self, table: _Table, grain_starts: tuple[int, ...], grain_sizes: tuple[int, ...], token_ids: np.ndarray
    ) -> Tensor:
        """Rows of a vocabulary table; zeros for foreign ids."""
        places = np.full(len(token_ids), -1, np.int32)
        for grain, (start, size) in enumerate(zip(grain_starts, grain_sizes, strict=True)):
            is_mine = (start <= token_ids) & (token_ids < start + size)
            places[is_mine] = token_ids[is_mine] - start + grain * table.units
        [indices] = to_device([places], self._device)
        return row_kernels.embed(table.weight.values, table.weight.scales, indices)

    def attention(
        self, x: Tensor, layer: _Attention, step: StepInput, cache: row_kernels.KvCache, spans: list[tuple[int, int]],
        out: Tensor | np.ndarray | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """The attention half of a layer: one partial sum [T, D] per tree node of this rank."""
        there, num_rows = self._step(step), rows_of_program(layer.qkv.dtype, cache)
        places, plan = there.places, there.plan(layer.groups.size, layer.window, num_rows)
        normed = row_kernels.rms_norm(x, layer.norm, layer.eps, layer.qkv.input_dtype)
        qkv = self._products.linear(normed, layer.qkv)
        q = row_kernels.rotate_and_store(qkv, places.positions, places.slots, layer.rotation, cache, layer.qkv.dtype)
        heads = attend(q, places.block_tables, cache, layer.groups, plan, layer.window, layer.o.input_dtype)
        return self._sums(heads, layer.o, spans, out)

    def mlp(
        self, x: Tensor, layer: _Mlp, spans: list[tuple[int, int]], out: Tensor | np.ndarray | None = None
    ) -> list[Tensor]:
        """The MLP half of a layer: one partial sum [T, D] per tree node of this rank."""
        normed = row_kernels.rms_norm(x, layer.norm, layer.eps, layer.gate_up.input_dtype)
        return self._sums(self._products.gated(normed, layer.gate_up, layer.down.input_dtype), layer.down, spans, out)

    def add_residual(self, x: Tensor, total: Tensor, bias: Tensor | None = None) -> Tensor:
        """x + (total + bias), in place."""
        return x.add_(total if bias is None else total + bias)

    def join(self, parts: list[Tensor]) -> Tensor:
        """Concatenate along the tokens."""
        return torch.cat(parts)

    def logits(self, x: Tensor, rows: np.ndarray, head: _Head) -> np.ndarray:
        """Norm and output head of some rows: [R, G, U]. It waits for the device."""
        [indices] = to_device([rows.astype(np.int32)], self._device)
        normed = row_kernels.rms_norm(x, head.norm, head.eps, head.weight.input_dtype, indices)
        logits = self._products.linear(normed, head.weight)
        return logits.float().cpu().numpy().reshape(len(rows), head.num_grains, -1)

    def argmax(self, logits: np.ndarray, grain_sizes: tuple[int, ...]) -> GrainBest:
        """The largest true logit of each row."""
        return self._host.argmax(logits, grain_sizes)

    def grain_stats(self, logits: np.ndarray, grain_sizes: tuple[int, ...]) -> GrainStats:
        """Maximum and exp-sum of logits [R, G, U] per grain."""
        return self._host.grain_stats(logits, grain_sizes)

    def largest(self, row: np.ndarray, count: int) -> np.ndarray:
        """Places of the largest values: value descending, place ascending."""
        return self._host.largest(row, count)

    def log(self, x: np.ndarray) -> np.ndarray:
        """Natural logarithm, computed in float64, in the precision of x."""
        return self._host.log(x)

    def exp(self, x: np.ndarray) -> np.ndarray:
        """Exponential in float32."""
        return self._host.exp(x)

    def _sums(
        self, x: Tensor, weight: GpuWeight, spans: list[tuple[int, int]], out: Tensor | np.ndarray | None
    ) -> list[Tensor]:
        shape = (len(spans), len(x), weight.num_out)
        nodes = out if isinstance(out, Tensor) and out.device.type == self._device.type else self.empty(shape)
        assert nodes.shape == shape and nodes.is_contiguous(), f"{nodes.shape = } {shape = }"
        self._products.sums(x, weight, spans, nodes)
        return list(nodes)

    def _step(self, step: StepInput) -> DeviceStep:
        for each in self._steps:
            if each.step is step:
                return each
        there = DeviceStep(step, self._device)
        self._steps = (there, *self._steps[:1])
        return there

    def _group_heads(self, layout: HeadLayout) -> HeadGroups:
        if layout not in self._groups:
            self._groups[layout] = group_heads(layout, self._device)
        return self._groups[layout]


def _sum_in_float32() -> None:
    """Let the library neither round operands of float32 nor add in the type of its operands."""
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = False
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
