"""Rotary frequencies and tables, as transformers defines them, in float32 whose bits depend on nothing but the entry.

Powers are taken one by one by libm; sine and cosine are own polynomials out of exact elementwise operations.
"""

import functools
import math

import numpy as np

from hpcinfer.config import RopeScaling
from hpcinfer.errors import ModelError

_ROWS = 4096  # positions computed at once
# pi/2 in three parts of 33 bits; polynomials on [-pi/4, pi/4]. Source: fdlibm, e_rem_pio2.c, k_sin.c, k_cos.c
_PIO2 = (1.57079632673412561417e00, 6.07710050630396597660e-11, 2.02226624879595063154e-21)
_SIN = (-1.66666666666666324348e-01, 8.33333333332248946124e-03, -1.98412698298579493134e-04,
        2.75573137070700676789e-06, -2.50507602534068634195e-08, 1.58969099521155010221e-10)  # fmt: skip
_COS = (4.16666666666666019037e-02, -1.38888888888741095749e-03, 2.48015872894767294178e-05,
        -2.75573143513906633035e-07, 2.08757232129817482790e-09, -1.13596475577881948265e-11)  # fmt: skip


@functools.lru_cache(maxsize=1)  # the only table of a process; made anew it would take a part of a recovery
def rope_table(max_len: int, head_size: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Cosines and sines of every position: float32 [max_len, 2, head_size / 2]."""
    frequencies = inverse_frequencies(head_size, theta, scaling)
    table = np.empty((max_len, 2, head_size // 2), np.float32)
    for start in range(0, max_len, _ROWS):
        positions = np.arange(start, min(start + _ROWS, max_len), dtype=np.float32)
        sine, cosine = sin_cos(positions[:, None] * frequencies)
        table[start : start + _ROWS, 0], table[start : start + _ROWS, 1] = cosine, sine
    table *= np.float32(scaling.attention_factor)
    return table


def inverse_frequencies(head_size: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Radians per position of each pair of columns: float32 [head_size / 2].

    Raises:
        ModelError: a kind of scaling that is not there.
    """
    exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    powers = np.array([math.pow(theta, float(exponent)) for exponent in exponents], np.float32)
    plain = np.float32(1) / powers
    if scaling.rope_type == "default":
        return plain
    if scaling.rope_type == "linear":
        return plain / np.float32(scaling.factor)
    if scaling.rope_type == "llama3":
        return _llama3(plain, scaling)
    if scaling.rope_type == "yarn":
        return _yarn(powers, theta, scaling)
    raise ModelError(f"rope_type {scaling.rope_type!r}", expected="default, linear, llama3 or yarn")


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Keep short wavelengths, stretch long ones, blend between. Source: Llama 3.1, transformers' llama3 rope."""
    original = np.float32(scaling.original_max_position_embeddings)
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    factor, wavelength = np.float32(scaling.factor), np.float32(2 * math.pi) / plain
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * plain / factor + smooth * plain
    stretched = np.where(wavelength > original / low, plain / factor, plain)
    return np.where((wavelength >= original / high) & (wavelength <= original / low), blended, stretched)


def _yarn(powers: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Blend stretched and plain frequencies along a ramp over the columns. Source: YaRN, arXiv:2309.00071."""
    size = 2 * len(powers)

    def column(rotations: float) -> float:
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return size * math.log(turns) / (2 * math.log(theta))

    low = max(math.floor(column(scaling.beta_fast)), 0)
    high = float(min(math.ceil(column(scaling.beta_slow)), size - 1))
    width = np.float32(high - low if high != low else 0.001)
    ramp = np.clip((np.arange(len(powers), dtype=np.float32) - np.float32(low)) / width, 0, 1)
    keep = 1 - ramp
    stretched = np.float32(1) / (np.float32(scaling.factor) * powers)
    return stretched * (1 - keep) + np.float32(1) / powers * keep


def sin_cos(angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sine and cosine of float32 angles from 0 to a million, rounded from float64."""
    x = angles.astype(np.float64)
    turns = np.rint(x * (2 / math.pi))
    for part in _PIO2:
        x = x - turns * part
    square, quadrant = x * x, turns.astype(np.int64) & 3
    sine = x + x * square * _horner(square, _SIN)
    cosine = 1 - square * 0.5 + square * square * _horner(square, _COS)
    swap = (quadrant & 1).astype(bool)
    sine, cosine = np.where(swap, cosine, sine), np.where(swap, sine, cosine)
    signed_sine = np.where(quadrant >= 2, -sine, sine)
    signed_cosine = np.where((quadrant == 1) | (quadrant == 2), -cosine, cosine)
    return signed_sine.astype(np.float32), signed_cosine.astype(np.float32)


def _horner(x: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    value = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value
