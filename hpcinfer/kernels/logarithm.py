"""The natural logarithm of all kernels on CPUs: operations that IEEE 754 rounds exactly, one numpy call each."""

import numpy as np


def log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm in float64, as 2 artanh((m - 1) / (m + 1)) + e ln 2 for x = m 2 ** e with m near 1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mantissa, exponent = np.frexp(np.asarray(x, np.float64))
        is_low = mantissa < np.sqrt(0.5)
        mantissa, exponent = np.where(is_low, 2 * mantissa, mantissa), exponent - is_low
        ratio = (mantissa - 1) / (mantissa + 1)
        square, series = ratio * ratio, np.zeros_like(ratio)
        for power in range(23, 1, -2):
            series = (series + 1 / power) * square
        value = 2 * ratio * series + 2 * ratio + exponent * np.log(2.0)
        value = np.where(np.isinf(x), x, np.where(x == 0, -np.inf, value))
        return np.where(x < 0, np.nan, value)
