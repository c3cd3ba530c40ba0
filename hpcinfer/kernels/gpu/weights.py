"""Weights on a GPU: once, in the layout that both the kernels and the library multiply with, and given back from it.

Shape letters: G grains (or KV heads), O outputs of a unit, I inputs of a unit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpcinfer.dtypes import dequantise
from hpcinfer.kernels.parts import Part
from hpcinfer.kernels.protocol import Weight

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class GpuWeight(NamedTuple):
    """A prepared weight: of column-parallel ones all outputs side by side, of a row-parallel one all grains."""

    values: Tensor  # [O, G * I]; int4 is uint8 [O, G * I / 2]
    scales: Tensor | None  # float32: int8 [O, G]; int4 [O, G * I / GROUP]
    dtype: torch.dtype  # of the products
    num_grains: int = 1  # that are summed: 1 if column-parallel
    bias: Tensor | None = None  # float32 [O]

    @property
    def num_out(self) -> int:
        """Outputs."""
        return self.values.shape[0]

    @property
    def num_in(self) -> int:
        """Inputs of a grain, padding of int4 included."""
        return self.values.shape[1] * (2 if self.is_int4 else 1) // self.num_grains

    @property
    def input_dtype(self) -> torch.dtype:
        """What it takes: rows that are to be quantised come unrounded."""
        return torch.float32 if self.is_int8 else self.dtype

    @property
    def is_int8(self) -> bool:
        """Whether rows are quantised, too."""
        return self.values.dtype == torch.int8

    @property
    def is_int4(self) -> bool:
        """Whether two codes share a byte."""
        return self.values.dtype == torch.uint8


@dataclass(frozen=True)
class Preparer:
    """Brings weights to a device.

    Args:
        device: of the copies.
        dtype: of products; "auto" is that of the weights, and bfloat16 for quantised ones.
    """

    device: torch.device
    dtype: str

    def columns(self, weights: Sequence[Weight], biases: Sequence[np.ndarray | None] = ()) -> GpuWeight:
        """Prepare column-parallel weights side by side; all have a bias, or none."""
        values = torch.cat([self._values(weight).flatten(0, 1) for weight in weights])
        scales = [scales.flatten(0, 1) for weight in weights if (scales := self._scales(weight)) is not None]
        flat = [torch.from_numpy(np.array(bias, np.float32).reshape(-1)) for bias in biases if bias is not None]
        bias = torch.cat(flat).to(self.device) if flat else None
        return GpuWeight(values, torch.cat(scales) if scales else None, self._dtype_for(weights[0]), bias=bias)

    def rows(self, weight: Weight) -> GpuWeight:
        """Prepare a row-parallel weight: [G, O, I] becomes [O, G * I]."""
        values, scales = self._values(weight), self._scales(weight)
        joined = None if scales is None else _side_by_side(scales)
        return GpuWeight(_side_by_side(values), joined, self._dtype_for(weight), len(values))

    def table(self, table: Weight) -> GpuWeight:
        """Prepare a vocabulary table [G, U, D] for its rows to be copied; an int4 one as float32."""
        if table.dtype != "int4":
            return self.columns([table])
        rows = torch.from_numpy(dequantise(table.values, table.dtype, table.scales)).flatten(0, 1)
        return GpuWeight(rows.to(self.device), None, torch.float32)

    def _values(self, weight: Weight) -> Tensor:
        """A copy of the values, in the type of the products; codes as they are."""
        values = torch.from_numpy(np.require(weight.values, requirements=["C", "W"]))
        if weight.dtype == "bfloat16":
            values = values.view(torch.bfloat16)
        return values.to(self.device, values.dtype if weight.scales is not None else self._dtype_for(weight), copy=True)

    def _scales(self, weight: Weight) -> Tensor | None:
        """A copy of the scales of a quantised weight: float32 [units, O, groups], one group if int8."""
        if weight.scales is None:
            return None
        scales = torch.from_numpy(np.require(weight.scales, requirements=["C", "W"]))
        scales = scales.view(torch.bfloat16) if weight.dtype == "int4" else scales.unsqueeze(-1)
        return scales.to(self.device, torch.float32, copy=True)

    def _dtype_for(self, weight: Weight) -> torch.dtype:
        return DTYPES.get(weight.dtype if self.dtype == "auto" else self.dtype, torch.bfloat16)


def give_back(part: Part, units: range, outs: range | None = None) -> Weight:
    """Some outputs of some units of a prepared weight, all outputs if `outs` is None; unquantised ones as float32."""
    outs = range(part.outs) if outs is None else outs
    weight = part.weight
    values = _cut(part, weight.values, units, outs)
    if weight.scales is None:
        return Weight(values.float().cpu().numpy(), "float32")
    scales = _cut(part, weight.scales, units, outs)
    if weight.is_int8:
        return Weight(values.cpu().numpy(), "int8", scales.squeeze(-1).cpu().numpy())
    return Weight(values.cpu().numpy(), "int4", scales.bfloat16().view(torch.uint16).cpu().numpy())


def _cut(part: Part, values: Tensor, units: range, outs: range) -> Tensor:
    """Outputs of units [units, outs, inputs] of values [O, inputs of all grains]."""
    if part.is_row:
        grains = values.view(len(values), part.weight.num_grains, -1)
        return grains[outs.start : outs.stop, units.start : units.stop].transpose(0, 1).contiguous()
    first, last = part.first_out + units.start * part.outs, part.first_out + units.stop * part.outs
    return values[first:last].view(len(units), part.outs, values.shape[1])[:, outs.start : outs.stop].contiguous()


def _side_by_side(values: Tensor) -> Tensor:
    """[G, O, I] as [O, G * I]."""
    return values.transpose(0, 1).flatten(1).contiguous()
