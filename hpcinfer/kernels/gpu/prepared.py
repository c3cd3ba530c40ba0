"""Weights on one GPU: halves of layers, the output head and the vocabulary table, prepared and given back."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpcinfer.errors import ConfigError
from hpcinfer.kernels.gpu.plan import HeadGroups, group_heads
from hpcinfer.kernels.gpu.rows import Rotation
from hpcinfer.kernels.gpu.weights import DTYPES, GpuWeight, Preparer, give_back
from hpcinfer.kernels.parts import Part, side_by_side
from hpcinfer.kernels.protocol import AttentionShape, AttentionWeights, HeadLayout, MlpWeights, Weight


class Attention(NamedTuple):
    """The attention half of a layer."""

    norm: Tensor
    eps: float
    window: int
    qkv: GpuWeight
    o: GpuWeight
    rotation: Rotation
    groups: HeadGroups
    parts: dict[str, Part]


class Mlp(NamedTuple):
    """The MLP half of a layer."""

    norm: Tensor
    eps: float
    gate_up: GpuWeight
    down: GpuWeight
    parts: dict[str, Part]


class Head(NamedTuple):
    """The last norm and the output head."""

    norm: Tensor
    eps: float
    weight: GpuWeight
    num_grains: int
    parts: dict[str, Part]


class Table(NamedTuple):
    """A vocabulary table."""

    weight: GpuWeight
    parts: dict[str, Part]
    units: int  # rows of a grain


class GpuWeights:
    """What kernels of a GPU do with weights.

    Args:
        device: of all arrays.
        dtype: of products; "auto" is that of the weights, and bfloat16 for quantised ones.
    """

    def __init__(self, device: torch.device, dtype: str) -> None:
        if dtype not in ("auto", *DTYPES):
            raise ConfigError(f"products in {dtype!r}", expected=f"auto, {', '.join(DTYPES)}")
        self._device, self._preparer = device, Preparer(device, dtype)
        self._groups: dict[HeadLayout, HeadGroups] = {}

    def device(self, array: np.ndarray) -> Tensor:
        """Copy a numpy array to the device."""
        return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(self._device, copy=True)

    def vector(self, values: np.ndarray) -> Tensor:
        """Prepare a float32 norm weight or bias."""
        return self.device(np.asarray(values, np.float32))

    def staging(self, num_bytes: int) -> np.ndarray:
        """Pinned memory, unless it is held by what was read before."""
        return self._preparer.loader.staging(num_bytes)

    def keeps_table(self, dtype: str) -> bool:
        """Never: the table is copied to the device."""
        return False

    def prepare_table(self, table: Weight) -> Table:
        """Prepare a vocabulary table [G, U, D]."""
        weight, units = self._preparer.table(table), table.values.shape[1]
        parts = {} if table.dtype == "int4" else {"embed_tokens": Part(weight, units)}
        return Table(weight, parts, units)

    def prepare_attention(self, weights: AttentionWeights, shape: AttentionShape) -> Attention:
        """Prepare the attention half of a layer: q, k and v side by side."""
        inputs, groups = (weights.q, weights.k, weights.v), self._group_heads(shape.layout)
        qkv = self._preparer.columns([each.weight for each in inputs], [each.bias for each in inputs])
        o = self._preparer.rows(weights.o)
        q_norm, k_norm = (None if norm is None else self.vector(norm) for norm in (weights.q_norm, weights.k_norm))
        rotation = Rotation(shape.rope, q_norm, k_norm, shape.eps, groups.head_columns, groups.num_columns)
        parts = side_by_side(qkv, ("q_proj", "k_proj", "v_proj"), [each.weight for each in inputs])
        parts["o_proj"] = Part(o, o.num_out, is_row=True)
        return Attention(self.vector(weights.norm), shape.eps, shape.window, qkv, o, rotation, groups, parts)

    def prepare_mlp(self, weights: MlpWeights, eps: float) -> Mlp:
        """Prepare the MLP half of a layer: gate and up side by side."""
        inputs = (weights.gate, weights.up)
        gate_up = self._preparer.columns([each.weight for each in inputs], [each.bias for each in inputs])
        down = self._preparer.rows(weights.down)
        parts = side_by_side(gate_up, ("gate_proj", "up_proj"), [each.weight for each in inputs])
        parts["down_proj"] = Part(down, down.num_out, is_row=True)
        return Mlp(self.vector(weights.norm), eps, gate_up, down, parts)

    def prepare_head(self, norm: np.ndarray, table: Weight, eps: float) -> Head:
        """Prepare the last norm and the output head, [G, U, D]."""
        weight = self._preparer.columns([table])
        parts = {"lm_head": Part(weight, table.values.shape[1])}
        return Head(self.vector(norm), eps, weight, table.values.shape[0], parts)

    def give_back(
        self, prepared: Attention | Mlp | Head | Table, name: str, units: range, outs: range | None = None
    ) -> Weight | None:
        """Units of a prepared weight; None of an int4 vocabulary table, which is kept as float32."""
        part = prepared.parts.get(name)
        return None if part is None else give_back(part, units, outs)

    def _group_heads(self, layout: HeadLayout) -> HeadGroups:
        if layout not in self._groups:
            self._groups[layout] = group_heads(layout, self._device)
        return self._groups[layout]
