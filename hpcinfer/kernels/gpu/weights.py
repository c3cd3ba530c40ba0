"""Weights on a GPU: once, in the layout that both the kernels and the library multiply with, and given back from it.

Shape letters: G grains (or KV heads), O outputs of a unit, I inputs of a unit.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpcinfer.dtypes import SCALES, dequantise
from hpcinfer.kernels.gpu.codes import KINDS
from hpcinfer.kernels.gpu.loading import Loader
from hpcinfer.kernels.parts import Part
from hpcinfer.kernels.protocol import Weight

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED = {**DTYPES, "int8": torch.int8, "float8_e4m3": torch.uint8, "int4": torch.uint8}  # as bytes are copied


class GpuWeight(NamedTuple):
    """A prepared weight: of column-parallel ones all outputs side by side, of a row-parallel one all grains."""

    values: Tensor  # [O, G * I]; int4 is uint8 [O, G * I / 2]
    scales: Tensor | None  # float32: int8 and fp8 [O, G]; int4 [O, G * I / GROUP]
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
        return torch.float32 if self.has_codes else self.dtype

    @property
    def normed_dtype(self) -> torch.dtype:
        """What it takes of a norm: codes at once, if rows are quantised."""
        return self.values.dtype if self.has_codes else self.dtype

    @property
    def has_codes(self) -> bool:
        """Whether rows are quantised, too, to the same kind of codes."""
        return self.values.dtype in KINDS

    @property
    def is_fp8(self) -> bool:
        """Whether codes are e4m3."""
        return self.values.dtype == torch.float8_e4m3fn

    @property
    def is_int4(self) -> bool:
        """Whether two codes share a byte."""
        return self.values.dtype == torch.uint8


class Preparer:
    """Brings weights to a device.

    What is prepared may be used on the stream that is current for the thread that has prepared it, and on those that
    wait for it.

    Args:
        device: of the copies.
        dtype: of products; "auto" is that of the weights, and bfloat16 for quantised ones.
        loader: which copies.
    """

    def __init__(self, device: torch.device, dtype: str, loader: Loader | None = None) -> None:
        self.device, self.dtype = device, dtype
        self.loader = Loader(device) if loader is None else loader

    def columns(self, weights: Sequence[Weight], biases: Sequence[np.ndarray | None] = ()) -> GpuWeight:
        """Prepare column-parallel weights side by side; all have a bias, or none."""
        sizes = [weight.values.shape[0] * weight.values.shape[1] for weight in weights]
        values = self._empty(weights[0], sum(sizes), weights[0].values.shape[2])
        scales = self._empty_scales(weights[0], sum(sizes), 1)
        for first, size, weight in zip(np.cumsum([0, *sizes]), sizes, weights, strict=False):
            rows = slice(int(first), int(first) + size)
            self._fill(values[None, rows], weight.values, weight.dtype)
            if scales is not None and weight.scales is not None:
                self._fill(scales[None, rows], weight.scales, SCALES[weight.dtype])
        flat = [torch.from_numpy(np.array(bias, np.float32).reshape(-1)) for bias in biases if bias is not None]
        bias = torch.cat(flat).to(self.device) if flat else None
        return self._prepared(values, scales, weights[0], bias=bias)

    def rows(self, weight: Weight) -> GpuWeight:
        """Prepare a row-parallel weight: [G, O, I] becomes [O, G * I]."""
        grains, num_out, num_in = weight.values.shape
        values, scales = self._empty(weight, num_out, grains * num_in), self._empty_scales(weight, num_out, grains)
        self._fill(_by_grain(values, grains), weight.values, weight.dtype)
        if scales is not None and weight.scales is not None:
            self._fill(_by_grain(scales, grains), weight.scales, SCALES[weight.dtype])
        return self._prepared(values, scales, weight, grains)

    def table(self, table: Weight) -> GpuWeight:
        """Prepare a vocabulary table [G, U, D] for its rows to be copied; an int4 one as float32."""
        if table.dtype != "int4":
            return self.columns([table])
        rows = dequantise(table.values, table.dtype, table.scales)
        return Preparer(self.device, "float32", self.loader).columns([Weight(rows, "float32")])

    def _empty(self, weight: Weight, num_out: int, num_in: int) -> Tensor:
        """Room for values in the type of the products; codes as they are."""
        dtype = self._dtype_for(weight) if weight.scales is None else _STORED[weight.dtype]
        return self.loader.empty((num_out, num_in), dtype)

    def _empty_scales(self, weight: Weight, num_out: int, num_units: int) -> Tensor | None:
        """Room for the scales of a quantised weight."""
        if weight.scales is None:
            return None
        groups = weight.scales.shape[2] if weight.dtype == "int4" else 1
        return self.loader.empty((num_out, num_units * groups), torch.float32)

    def _fill(self, target: Tensor, stored: np.ndarray, dtype: str) -> None:
        self.loader.fill(target, stored.reshape(target.shape), _STORED[dtype])

    def _prepared(
        self, values: Tensor, scales: Tensor | None, weight: Weight, num_grains: int = 1, bias: Tensor | None = None
    ) -> GpuWeight:
        self.loader.hand_over()
        values = values.view(torch.float8_e4m3fn) if weight.dtype == "float8_e4m3" else values
        return GpuWeight(values, scales, self._dtype_for(weight), num_grains, bias)

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
    if weight.has_codes:
        codes, dtype = (values.view(torch.uint8), "float8_e4m3") if weight.is_fp8 else (values, "int8")
        return Weight(codes.cpu().numpy(), dtype, scales.squeeze(-1).cpu().numpy())
    return Weight(values.cpu().numpy(), "int4", scales.bfloat16().view(torch.uint16).cpu().numpy())


def _cut(part: Part, values: Tensor, units: range, outs: range) -> Tensor:
    """Outputs of units [units, outs, inputs] of values [O, inputs of all grains]."""
    if part.is_row:
        grains = values.view(len(values), part.weight.num_grains, -1)
        return grains[outs.start : outs.stop, units.start : units.stop].transpose(0, 1).contiguous()
    first, last = part.first_out + units.start * part.outs, part.first_out + units.stop * part.outs
    return values[first:last].view(len(units), part.outs, values.shape[1])[:, outs.start : outs.stop].contiguous()


def _by_grain(values: Tensor, grains: int) -> Tensor:
    """[O, G * I] as [G, O, I]."""
    return values.view(len(values), grains, values.shape[1] // grains).transpose(0, 1)
