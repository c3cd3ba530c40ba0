"""Codes that stand for numbers by a scale: int8, and e4m3 as bytes, since not every GPU has that type.

Codes are rounded to nearest, ties to even; the largest magnitude of those that share a scale has the largest code, and
zeros have the scale 0. What an e4m3 byte means is a float16 of another exponent, so that both ways are a few operations
on integers, with the same bits on every GPU.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

INT8, E4M3 = constexpr(8), constexpr(43)  # kinds of codes with a scale per row; less is none, or int4
KINDS = {torch.int8: INT8.value, torch.float8_e4m3fn: E4M3.value}
LARGEST = constexpr(3.4028234663852886e38)  # number of float32
_TINY = constexpr(1e-35)  # numbers below are zero: the largest code / x must stay finite
_ROUND = constexpr(12582912.0)  # 1.5 * 2 ** 23: adding it leaves no place for a fraction
_ROUND_SMALL = constexpr(16384.0)  # 2 ** 14: adding it leaves multiples of 2 ** -9, of which the first codes count


@functools.cache
def has_fp8(device: torch.device) -> bool:
    """Whether a device loads and multiplies e4m3: NVIDIA's do from compute capability 8.9 on."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 9)


def loadable(values: Tensor) -> Tensor:
    """A tensor as kernels take it: e4m3 as bytes where the device does not have the type."""
    return values if values.dtype != torch.float8_e4m3fn or has_fp8(values.device) else values.view(torch.uint8)


def writable(codes: Tensor) -> Tensor:
    """A tensor as kernels write codes into it: e4m3 as bytes."""
    return codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes


@triton.jit
def finite(values: tensor, LIMIT: constexpr) -> tensor:
    """NaN as 0, and what is beyond the limit as the limit."""
    values = tl.where(values != values, 0.0, values)
    return tl.minimum(tl.maximum(values, -LIMIT), LIMIT)


@triton.jit
def codes_of(values: tensor, largest: tensor, KIND: constexpr) -> tensor:
    """Codes of finite float32 values; `largest` is the largest magnitude of those that share a scale."""
    MOST: constexpr = 127.0 if KIND == INT8 else 448.0
    values = values * tl.where(largest < _TINY, 0.0, tl.div_rn(MOST, tl.maximum(largest, _TINY)))
    if KIND == INT8:
        rounded = (values + _ROUND) - _ROUND
        codes = tl.minimum(tl.maximum(rounded, -127.0), 127.0).to(tl.int8)
    else:
        codes = _e4m3_bytes(values)
    return codes


@triton.jit
def scale_of(largest: tensor, KIND: constexpr) -> tensor:
    """The scale of such codes."""
    MOST: constexpr = 127.0 if KIND == INT8 else 448.0
    return tl.where(largest < _TINY, 0.0, tl.div_rn(largest, MOST))


@triton.jit
def _e4m3_bytes(values: tensor) -> tensor:
    magnitude = tl.minimum(tl.abs(values), 448.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # exponents count from 7 instead of 127
    small = (magnitude + _ROUND_SMALL).to(tl.int32, bitcast=True) - 0x46800000  # the bits of 2 ** 14
    sign = (values.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(magnitude < 0.015625, small, normal) | sign).to(tl.uint8)


@triton.jit
def from_e4m3(codes: tensor) -> tensor:
    """What bytes of e4m3 mean, as float16, exactly; none of them is NaN."""
    wide = codes.to(tl.int16)
    halves = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return halves.to(tl.float16, bitcast=True) * 256.0
