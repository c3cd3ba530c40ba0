"""Weights in the layout that the C library computes with: packed, and given back as they were."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcinfer.dtypes import GROUP
from hpcinfer.kernels.fp8_weights import without_fp8
from hpcinfer.kernels.native.library import Library
from hpcinfer.kernels.parts import Part
from hpcinfer.kernels.protocol import HeadLayout, Linear, Weight

_KINDS = ("float32", "bfloat16", "float16", "int8", "int4")  # HPC_FLOAT32, … HPC_INT4


class Packer:
    """Packs weights, each thread what it will compute with."""

    def __init__(self, library: Library, threads: int) -> None:
        self._lib, self._library, self._threads = library.lib, library, threads

    def columns(self, weights: Sequence[Weight], num_in: int) -> Any:
        """Pack column-parallel weights side by side."""
        weights = [without_fp8(weight) for weight in weights]
        sizes = [weight.values.shape[0] * weight.values.shape[1] for weight in weights]
        packed = self._new(weights[0].dtype, 1, sum(sizes), num_in)
        for weight, size, end in zip(weights, sizes, np.cumsum(sizes), strict=True):
            self._fill(packed, 0, int(end) - size, weight)
        return packed

    def gated(self, gate: Weight, up: Weight, num_in: int) -> Any:
        """Pack gates and what they multiply, each in whole panels."""
        gate, up = without_fp8(gate), without_fp8(up)
        count = gate.values.shape[0] * gate.values.shape[1]
        packed = self._owned(self._lib.hpc_gated_weight_new(self._kind(gate.dtype), count, num_in))
        self._fill(packed, 0, 0, gate)
        self._fill(packed, 0, packed.num_out // 2, up)
        return packed

    def rows(self, weight: Weight, num_in: int) -> Any:
        """Pack a row-parallel weight, grain by grain."""
        weight = without_fp8(weight)
        grains, num_out = weight.values.shape[:2]
        packed = self._new(weight.dtype, grains, num_out, num_in)
        for grain in range(grains):
            self._fill(packed, grain, 0, cut(weight, range(grain, grain + 1)))
        return packed

    def leave_padding_out(self, qkv: Any, o: Any, layout: HeadLayout) -> tuple[np.ndarray, ...]:
        """Have products pass over heads that a grain has room for and does not hold.

        Returns:
            Arrays that must live as long as the weights.
        """
        heads = np.array(layout.grain_heads, np.int64)
        if (heads == layout.heads_per_grain).all():
            return ()
        inputs = heads * layout.head_size
        is_true = np.ones(qkv.num_out, bool)
        is_true[: o.grains * o.num_in] = (np.arange(o.num_in) < inputs[:, None]).ravel()
        panels = np.flatnonzero(np.logical_or.reduceat(is_true, np.arange(0, qkv.num_out, self._lib.HPC_PANEL)))
        qkv.listed_panels, qkv.num_listed = self._library.pointer("int64_t[]", panels), len(panels)
        o.true_inputs = self._library.pointer("int64_t[]", inputs)
        return panels, inputs

    def give_back(self, part: Part, units: range, outs: range | None = None) -> Weight:
        """Some outputs of some units of a packed weight, all outputs if `outs` is None, as they were."""
        outs = range(part.outs) if outs is None else outs
        values, scales = self._room(part.weight, (len(units), len(outs)))
        for i, unit in enumerate(units):
            grain, first = (unit, 0) if part.is_row else (0, part.first_out + unit * part.outs)
            scale = None if scales is None else scales[i]
            self._lib.hpc_weight_read(
                part.weight, grain, first + outs.start, len(outs), self._library.pointer("char[]", values[i]),
                self._library.pointer("char[]", scale),
            )  # fmt: skip
        return Weight(values, _KINDS[part.weight.kind], scales)

    def _room(self, packed: Any, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray | None]:
        """Arrays for outputs of units and their scales."""
        if packed.kind == self._library.kind("int4"):
            groups = packed.padded_in // GROUP
            return np.empty((*shape, packed.padded_in // 2), np.uint8), np.empty((*shape, groups), np.uint16)
        if packed.kind == self._library.kind("int8"):
            return np.empty((*shape, packed.num_in), np.int8), np.empty(shape, np.float32)
        return np.empty((*shape, packed.num_in), np.float32), None

    def _new(self, dtype: str, grains: int, num_out: int, num_in: int) -> Any:
        return self._owned(self._lib.hpc_weight_new(self._kind(dtype), grains, num_out, num_in))

    def _owned(self, packed: Any) -> Any:
        return self._library.owned(packed, self._lib.hpc_weight_free)

    def _kind(self, dtype: str) -> int:
        return self._library.kind(dtype if dtype in ("int8", "int4") else "float32")

    def _fill(self, packed: Any, grain: int, first_out: int, weight: Weight) -> None:
        values, count = np.ascontiguousarray(weight.values), weight.values.shape[0] * weight.values.shape[1]
        scales = None if weight.scales is None else np.ascontiguousarray(weight.scales)
        self._lib.hpc_weight_fill(
            packed, self._threads, grain, first_out, count, self._library.kind(weight.dtype),
            self._library.pointer("char[]", values), self._library.pointer("char[]", scales),
        )  # fmt: skip


def biases(linears: tuple[Linear, ...], multiple: int = 1) -> np.ndarray | None:
    """Biases side by side, each with zeros up to a multiple; all linears have one, or none."""
    biases = [linear.bias.reshape(-1) for linear in linears if linear.bias is not None]
    padded = [np.pad(bias, (0, -len(bias) % multiple)) for bias in biases]
    return np.concatenate(padded).astype(np.float32, copy=False) if padded else None


def cut(weight: Weight, units: range, outs: range | None = None) -> Weight:
    """Some units of a weight, and some of their outputs."""
    rows = slice(units.start, units.stop), slice(None) if outs is None else slice(outs.start, outs.stop)
    return Weight(weight.values[rows], weight.dtype, None if weight.scales is None else weight.scales[rows])
