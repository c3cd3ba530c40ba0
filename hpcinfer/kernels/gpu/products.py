"""Products with weights: a Triton kernel that keeps the kernel contract, and torch's library where it need not be kept.

**One order.** An element is a chain over the inputs of a grain (of all inputs, where a weight is column-parallel) in
ascending order, from zero, in one float32 accumulator; then grains are added in the tree. A tile says which elements a
program has, not how one is summed: on tensor cores every element of an instruction goes through the same sixteen (int8
and fp8: 32) inputs, whatever its place, and the instructions of all tiles here are of one kind. That is probed all the
same: where the tiles differ in a bit, only the narrow one is used. Nothing is split by the number of rows.

Sums of fp8 products are exact to some 14 bits inside Hopper's tensor cores; those of each 128 inputs are added in
float32. Devices without fp8 multiply the same codes as float16.

Shape letters: T rows, I inputs of a grain, O outputs, G grains.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from hpcinfer.dtypes import GROUP
from hpcinfer.kernels.gpu.codes import KINDS, has_fp8, loadable
from hpcinfer.kernels.gpu.product_kernels import product_kernel, tree_kernel
from hpcinfer.kernels.gpu.rows import EXACT, Operand, aligned, quantise, silu_mul
from hpcinfer.kernels.gpu.weights import GpuWeight

logger = logging.getLogger(__name__)

_FEW_ROWS = 64  # up to here each grain has programs of its own: there are too few rows to fill a GPU with
_BAND = 16  # tiles of rows whose programs run one after the other
_MOST_GRAINS = 16  # that a program walks


class Tile(NamedTuple):
    """Elements of a program, and the resources that it takes."""

    rows: int
    columns: int
    depth: int  # inputs of two bytes at a time, or twice as many of e4m3; a multiple of what an instruction takes
    num_warps: int
    num_stages: int


NARROW = Tile(64, 32, 64, 4, 6)
WIDE = Tile(128, 128, 64, 8, 3)
WALKING = Tile(128, 64, 64, 8, 4)  # sums of grains that wait take registers, too
_PLAIN = Tile(64, 32, 32, 4, 2)  # float32, without tensor cores


@dataclass(frozen=True)
class Products:
    """How products are made on one device."""

    device: torch.device
    reproducible: bool

    def linear(self, x: Operand, weight: GpuWeight) -> Tensor:
        """x [T, I] times the weight, plus its bias: [T, O], in float32 or, if the library makes it, rounded."""
        if self._is_library(weight):
            bias = None if weight.bias is None else weight.bias.to(x.values.dtype)
            return torch.nn.functional.linear(x.values, weight.values, bias)
        if len(x.values) and self._is_library_fp8(weight):
            return _scaled_linear(x, weight)
        out = torch.empty(len(x.values), weight.num_out, device=x.values.device)
        self._launch(_Call(_prepared(x, weight), weight, out))
        return out

    def gated(self, x: Operand, weight: GpuWeight, dtype: torch.dtype) -> Tensor:
        """silu(gate) * up, which stand side by side in the weight: [T, O / 2] in `dtype`."""
        if self._is_library(weight) or self._is_library_fp8(weight):
            return silu_mul(self.linear(x, weight), dtype)
        out = torch.empty(len(x.values), weight.num_out // 2, dtype=dtype, device=x.values.device)
        self._launch(_Call(_prepared(x, weight), weight, out, is_gated=True))
        return out

    def sums(self, x: Tensor, weight: GpuWeight, spans: Sequence[tuple[int, int]], out: Tensor) -> None:
        """x [T, G * I] times the weight: for each run of grains the sum of their products, into out [spans, T, O]."""
        if self._is_library(weight):
            for (start, stop), target in zip(spans, out, strict=True):
                inputs = slice(start * weight.num_in, stop * weight.num_in)
                target.copy_(_matmul(x[:, inputs], weight.values[:, inputs]))
            return
        operand = operand_of(x, weight)
        for span, target in zip(spans, out, strict=True):
            self._tree_sum(operand, weight, span, target)

    def _tree_sum(self, operand: Operand, weight: GpuWeight, span: tuple[int, int], out: Tensor) -> None:
        num_grains = span[1] - span[0]
        walk = 1 if len(out) <= _FEW_ROWS else min(num_grains, _MOST_GRAINS)
        nodes = out.unsqueeze(0)
        if walk < num_grains:
            nodes = torch.empty(num_grains // walk, *out.shape, device=out.device)
        self._launch(_Call(operand, weight, nodes, span[0], walk))
        if walk < num_grains and out.numel():
            add_nodes(nodes, out)

    def _launch(self, call: "_Call") -> None:
        if call.out.numel():
            launch(call, self._tile(call))

    def _tile(self, call: "_Call") -> Tile:
        dtype = call.operand.values.dtype
        if dtype == torch.float32:
            return _PLAIN
        if call.out.shape[-2] <= _FEW_ROWS or not tiles_are_alike(dtype, self.device):
            return NARROW
        return WIDE if call.walk == 1 else WALKING

    def _is_library(self, weight: GpuWeight) -> bool:
        return not self.reproducible and weight.scales is None

    def _is_library_fp8(self, weight: GpuWeight) -> bool:
        """Whether the library multiplies codes with a scale for each row and output; it wants sizes in sixteens."""
        is_possible = weight.is_fp8 and weight.num_grains == 1 and not (weight.num_in % 16 or weight.num_out % 16)
        return not self.reproducible and is_possible and has_scaled_products(self.device)


class _Call(NamedTuple):
    """One launch of the product kernel."""

    operand: Operand
    weight: GpuWeight
    out: Tensor  # [nodes, T, O], or [T, O] of one
    first_grain: int = 0
    walk: int = 1  # grains of a node
    is_gated: bool = False


def launch(call: _Call, tile: Tile) -> None:
    """Run the product kernel with one kind of tile."""
    (x, x_scales), weight, (num_rows, num_columns) = call.operand, call.weight, call.out.shape[-2:]
    columns = tile.columns // 2 if call.is_gated else tile.columns
    tiles = triton.cdiv(num_columns, columns) * triton.cdiv(num_rows, tile.rows)
    product_kernel[tiles, call.out.numel() // (num_rows * num_columns)](
        loadable(x), loadable(weight.values), weight.bias, x_scales, weight.scales, call.out, num_rows,
        call.first_grain, OUTS=num_columns, INS=x.shape[1] // weight.num_grains, W_INS=weight.num_in,
        G=weight.num_grains, WALK=call.walk, GATED=call.is_gated, HAS_BIAS=weight.bias is not None, KIND=_kind(weight),
        GROUP=GROUP, IS_WIDE=_is_wide(x.dtype), ROWS=tile.rows, COLUMNS=tile.columns, BAND=_BAND,
        DEPTH=_depth(weight, tile), num_warps=tile.num_warps, num_stages=tile.num_stages, **EXACT,
    )  # fmt: skip


def add_nodes(nodes: Tensor, out: Tensor) -> None:
    """Add nodes [N, ...], N a power of two, in the tree, into out."""
    while len(nodes) > 1:
        width = min(len(nodes), _MOST_GRAINS)
        num_sums = len(nodes) // width
        sums = out.unsqueeze(0) if num_sums == 1 else torch.empty(num_sums, *out.shape, device=out.device)
        grid = (triton.cdiv(out.numel(), 1024), num_sums)
        tree_kernel[grid](nodes, sums, out.numel(), N=width, BLOCK=1024, **EXACT)
        nodes = sums


@functools.cache
def tiles_are_alike(dtype: torch.dtype, device: torch.device) -> bool:
    """Probe whether all tiles give the same bits, at every place of a tile."""
    random = torch.Generator().manual_seed(7)
    x, values = torch.randn(150, 264, generator=random), torch.randn(150, 264, generator=random)
    if dtype in KINDS:
        weight = GpuWeight((values * 40).to(device, dtype), torch.ones(150, 1, device=device), torch.float32)
    else:
        weight = GpuWeight(values.to(device, dtype), None, dtype)
    operand, results = operand_of(x.to(device, weight.input_dtype), weight), []
    for tile in (NARROW, WIDE, WALKING):
        results.append(torch.empty(150, 150, device=device))
        launch(_Call(operand, weight, results[-1]), tile)
    is_alike = all(torch.equal(result, results[0]) for result in results)
    if not is_alike:
        logger.warning("tiles differ in bits of products in %s here: only narrow ones are used, more slowly", dtype)
    return is_alike


@functools.cache
def has_scaled_products(device: torch.device) -> bool:
    """Whether torch multiplies e4m3 by e4m3 on this device, with a scale for each row and output."""
    if not has_fp8(device):
        return False
    codes, scales = torch.zeros(16, 16, device=device).to(torch.float8_e4m3fn), torch.ones(16, 1, device=device)
    try:
        torch._scaled_mm(codes, codes.t(), scales, scales.t(), out_dtype=torch.bfloat16)
    except (AttributeError, RuntimeError, ValueError) as error:
        logger.debug("no products of fp8 by the library: %s", error)
        return False
    return True


def _scaled_linear(x: Operand, weight: GpuWeight) -> Tensor:
    assert x.scales is not None and weight.scales is not None, f"{x.values.dtype = }"
    bias = None if weight.bias is None else weight.bias.bfloat16()
    return torch._scaled_mm(
        x.values, weight.values.t(), x.scales, weight.scales.t(), bias=bias, out_dtype=torch.bfloat16
    )


def _matmul(x: Tensor, values: Tensor) -> Tensor:
    """x times the transposed values, summed and returned in float32."""
    if x.is_cuda and x.dtype == values.dtype != torch.float32:
        return torch.mm(x, values.t(), out_dtype=torch.float32)
    return torch.mm(x.float(), values.t().float())


def _kind(weight: GpuWeight) -> int:
    return 4 if weight.is_int4 else KINDS.get(weight.values.dtype, 0)


def _depth(weight: GpuWeight, tile: Tile) -> int:
    return GROUP if weight.is_int4 else 2 * tile.depth if weight.is_fp8 else tile.depth


def operand_of(x: Tensor, weight: GpuWeight) -> Operand:
    """Rows as they are multiplied with a weight: rounded or quantised, in a run for each of its grains."""
    if weight.has_codes:
        assert x.is_contiguous(), f"{x.shape = } {x.stride() = }"
        return quantise(x, weight.num_grains, weight.values.dtype)
    return _prepared(Operand(x, None), weight)


def _prepared(x: Operand, weight: GpuWeight) -> Operand:
    """Rows of a norm as kernels take them."""
    assert x.values.is_contiguous(), f"{x.values.shape = } {x.values.stride() = }"
    return x if weight.has_codes else Operand(aligned(x.values.to(weight.dtype)), None)


def _is_wide(dtype: torch.dtype) -> bool:
    """Whether operands are widened to float32: the interpreter takes the bits of bfloat16 for integers."""
    return dtype == torch.bfloat16 and bool(triton.knobs.runtime.interpret)
