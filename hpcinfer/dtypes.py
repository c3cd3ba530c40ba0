"""Element types of weights as numpy sees them; what numpy lacks is raw: bfloat16 in uint16, float8_e4m3 in uint8.

int8, float8_e4m3 and int4 are codes that mean something with their scales: the first two have one scale per row (a
unit's output), int4 one per GROUP inputs of a row. Two int4 codes share a byte, each with 8 added. float8_e4m3 is OCP's
e4m3fn: 4 bits of exponent, 3 of mantissa, no infinities.
"""

from typing import Any

import numpy as np

STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int8": np.dtype("<i1"),
    "float8_e4m3": np.dtype("<u1"),
    "int4": np.dtype("<u1"),
}
SCALES = {"int8": "float32", "float8_e4m3": "float32", "int4": "bfloat16"}  # type of the scales of quantised types
GROUP = 32  # inputs that share a scale of int4
E4M3_MAX = 448.0
_INT4_ZERO = np.uint8(8)  # what is added to a code of int4


def to_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """Widen stored values to float32, exactly; no copy if they are float32 already."""
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "float8_e4m3":
        return _E4M3[values]
    return values.astype(np.float32, copy=False)


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round float32 values to a storage type: to nearest, ties to even; NaN stays NaN.

    What is too large for float8_e4m3 becomes its largest value."""
    if dtype == "float8_e4m3":
        return _to_e4m3(np.ascontiguousarray(values, np.float32))
    if dtype != "bfloat16":
        return values.astype(STORAGE[dtype], copy=False)
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def dequantise(values: np.ndarray, dtype: str, scales: np.ndarray | None) -> np.ndarray:
    """Widen stored values of any type to float32, quantised ones by their scales.

    Args:
        values: [..., O, I] as stored; int4 is [..., O, I / 2].
        dtype: their type.
        scales: int8, float8_e4m3: float32 [..., O]; int4: raw bfloat16 [..., O, I / GROUP]; None for the other types.
    """
    if scales is None or dtype in ("int8", "float8_e4m3"):
        wide = to_float32(values, dtype)
        return wide if scales is None else wide * scales[..., None]
    codes = int4_codes(values)
    groups = codes.reshape(*codes.shape[:-1], -1, GROUP).astype(np.float32)
    return (groups * to_float32(scales, "bfloat16")[..., None]).reshape(codes.shape)


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """Pack codes from -8 to 7, int8 [..., I] with an even I: uint8 [..., I / 2], the even input in the low half."""
    raw = codes.view(np.uint8) + _INT4_ZERO
    return raw[..., 0::2] | (raw[..., 1::2] << np.uint8(4))


def int4_codes(values: np.ndarray) -> np.ndarray:
    """Inverse of `pack_int4`."""
    halves = np.stack([values & np.uint8(15), values >> np.uint8(4)], axis=-1)
    return (halves - _INT4_ZERO).view(np.int8).reshape(*values.shape[:-1], 2 * values.shape[-1])


def all_finite(values: np.ndarray, dtype: str) -> bool:
    """Whether stored values hold neither NaN nor infinity."""
    if dtype == "bfloat16":
        return bool(((values & np.uint16(0x7F80)) != np.uint16(0x7F80)).all())
    return bool(np.isfinite(values).all())


def raw_bytes(values: np.ndarray) -> memoryview:
    """View a C-contiguous array as bytes, without a copy."""
    assert values.flags.c_contiguous, f"{values.shape = } {values.strides = }"
    return values.reshape(-1).view(np.uint8).data


def _all_e4m3() -> np.ndarray:
    """What each of the 256 codes means: a float16 of other exponent, but for the two NaN."""
    codes = np.arange(256, dtype=np.uint16)
    halves = ((codes & 0x80) << 8 | (codes & 0x7F) << 7).astype(np.uint16).view(np.float16)
    values = halves.astype(np.float32) * np.float32(256)
    values[codes & 0x7F == 0x7F] = np.nan
    return values


_E4M3 = _all_e4m3()


def _to_e4m3(values: np.ndarray) -> np.ndarray:
    magnitude = np.minimum(np.abs(values), np.float32(E4M3_MAX))
    bits = magnitude.view(np.uint32)
    odd = (bits >> np.uint32(20)) & np.uint32(1)
    normal = ((bits + np.uint32(0x7FFFF) + odd) >> np.uint32(20)) - np.uint32(120 << 3)  # exponents have another bias
    with np.errstate(invalid="ignore"):
        subnormal = np.rint(magnitude * np.float32(512)).astype(np.uint32)  # of NaN, whatever it is
    codes = np.where(magnitude < np.float32(2**-6), subnormal, normal)
    codes = np.where(np.isnan(values), np.uint32(0x7F), codes)
    return (codes | (values.view(np.uint32) >> np.uint32(24)) & np.uint32(0x80)).astype(np.uint8)
