"""Element types of weights as numpy sees them; bfloat16, which numpy lacks, is its raw uint16."""

from typing import Any

import numpy as np

STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}


def to_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """Widen stored values to float32, exactly; no copy if they are float32 already."""
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32, copy=False)


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round float32 values to a storage type: to nearest, ties to even; NaN stays NaN."""
    if dtype != "bfloat16":
        return values.astype(STORAGE[dtype], copy=False)
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def all_finite(values: np.ndarray, dtype: str) -> bool:
    """Whether stored values hold neither NaN nor infinity."""
    if dtype == "bfloat16":
        return bool(((values & np.uint16(0x7F80)) != np.uint16(0x7F80)).all())
    return bool(np.isfinite(values).all())


def raw_bytes(values: np.ndarray) -> memoryview:
    """View a C-contiguous array as bytes, without a copy."""
    assert values.flags.c_contiguous, f"{values.shape = } {values.strides = }"
    return values.reshape(-1).view(np.uint8).data
