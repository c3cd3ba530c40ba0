"""Quantised weights: codes and scales of one unit, by rounding to nearest or, with moments, as GPTQ does.

int8 and float8_e4m3 have a scale per output, whose largest weight has the largest code: 127 or 448. int4 has a scale
per GROUP inputs: the one of a few candidates with the least squared error; it may be negative, so that -8 serves the
largest weight of either sign.
Outputs do not depend on each other, and sums are float64 in one order.
"""

from typing import NamedTuple

import numpy as np

from hpcinfer.dtypes import E4M3_MAX, GROUP, pack_int4, round_to, to_float32

DAMPING = 0.01  # of the mean second moment, added to all: keeps the factors well conditioned
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)  # of the scale that clips nothing
_ROWS = 1024  # rounded at once
_BLOCK = 128  # inputs whose errors are passed on together; a multiple of GROUP


class Quantised(NamedTuple):
    """A unit as stored."""

    values: np.ndarray  # int8 [O, I], raw float8_e4m3 [O, I], or uint8 [O, padded inputs / 2]
    scales: np.ndarray  # float32 [O] or raw bfloat16 [O, groups]


def padded_inputs(num_inputs: int) -> int:
    """Inputs that a row of int4 has room for: whole groups. Not collective."""
    return -(-num_inputs // GROUP) * GROUP


def quantise(unit: np.ndarray, kind: str, factor: np.ndarray | None = None) -> Quantised:
    """Quantise a unit [O, I] of float32.

    Not collective.

    Args:
        unit: the weights of O outputs.
        kind: int8, float8_e4m3 or int4.
        factor: of `error_factor`, for int4; None rounds to nearest.
    """
    parts = [_quantise_rows(unit[start : start + _ROWS], kind, factor) for start in range(0, len(unit), _ROWS)]
    return Quantised(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def error_factor(moments: np.ndarray) -> np.ndarray:
    """Make of second moments of inputs, float64 [I, I], what tells an input's error to the inputs after it.

    Not collective. It is the upper Cholesky factor of their inverse; the shape is padded to whole groups.

    Source: Frantar et al. 2022, GPTQ, algorithm 1.
    """
    size = padded_inputs(len(moments))
    damped = np.zeros((size, size))
    damped[: len(moments), : len(moments)] = moments
    mean = float(np.trace(moments)) / max(1, len(moments))
    damped[np.diag_indices(size)] += DAMPING * mean if mean > 0 else 1.0
    return np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(damped)).T)


def _quantise_rows(rows: np.ndarray, kind: str, factor: np.ndarray | None) -> Quantised:
    wide = rows.astype(np.float64)
    if kind == "int8":
        scales = (np.abs(wide).max(axis=1) / 127).astype(np.float32)
        return Quantised(_codes(wide, scales.astype(np.float64)[:, None], -127, 127), scales)
    if kind == "float8_e4m3":
        scales = (np.abs(wide).max(axis=1) / E4M3_MAX).astype(np.float32)
        return Quantised(round_to(_quotients(wide, scales.astype(np.float64)[:, None]), kind), scales)
    padded = np.zeros((len(wide), padded_inputs(wide.shape[1])))
    padded[:, : wide.shape[1]] = wide
    codes, scales = _nearest(padded) if factor is None else _compensated(padded, factor)
    return Quantised(pack_int4(codes), round_to(scales.astype(np.float32), "bfloat16"))


def _nearest(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes [O, I] and scales [O, groups], each weight rounded by itself."""
    groups = rows.reshape(len(rows), -1, GROUP)
    scales = _best_scales(groups)
    return _codes(groups, scales[..., None], -8, 7).reshape(rows.shape), scales


def _compensated(rows: np.ndarray, factor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same, where each input's rounding error is made up for by the inputs after it."""
    inputs = np.ascontiguousarray(rows.T)  # [I, O]: what is done input by input is contiguous
    codes, scales = np.zeros(inputs.shape, np.int8), np.zeros((len(inputs) // GROUP, len(rows)))
    for start in range(0, len(inputs), _BLOCK):
        stop = min(start + _BLOCK, len(inputs))
        errors = np.zeros((stop - start, len(rows)))
        for i in range(start, stop):
            if i % GROUP == 0:
                scales[i // GROUP] = _best_scales(inputs[i : i + GROUP].T)
            scale = scales[i // GROUP]
            codes[i] = _codes(inputs[i], scale, -8, 7)
            errors[i - start] = (inputs[i] - codes[i] * scale) / factor[i, i]
            inputs[i + 1 : stop] -= factor[i, i + 1 : stop, None] * errors[i - start]
        inputs[stop:] -= factor[start:stop, stop:].T @ errors
    return np.ascontiguousarray(codes.T), np.ascontiguousarray(scales.T)


def _best_scales(groups: np.ndarray) -> np.ndarray:
    """Scale of each run along the last axis, as bfloat16 holds it: the candidate of the least squared error."""
    places = np.abs(groups).argmax(axis=-1)[..., None]
    largest = np.take_along_axis(groups, places, axis=-1)[..., 0]
    best, least = np.zeros(largest.shape), np.full(largest.shape, np.inf)
    for full_scale in (np.abs(largest) / 7, largest / -8):
        for shrink in _SHRINK:
            rounded = round_to((full_scale * shrink).astype(np.float32), "bfloat16")
            scale = to_float32(rounded, "bfloat16").astype(np.float64)
            codes = _codes(groups, scale[..., None], -8, 7)
            error = np.square(codes * scale[..., None] - groups).sum(axis=-1)
            best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return np.where(largest != 0, best, 0.0)


def _codes(values: np.ndarray, scales: np.ndarray, lowest: int, highest: int) -> np.ndarray:
    """Round to codes."""
    return np.clip(np.rint(_quotients(values, scales)), lowest, highest).astype(np.int8)


def _quotients(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What is rounded; zero where the scale is, which a weight below the smallest float32 may have."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(scales != 0, values / scales, 0.0)
