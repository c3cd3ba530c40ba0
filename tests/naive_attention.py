"""Attention in float64, straight from its definition: what kernels are compared with."""

from collections.abc import Callable, Sequence

import numpy as np

from hpcinfer.config import RopeScaling
from hpcinfer.kernels.protocol import HeadLayout
from hpcinfer.kernels.rope import rope_table

EPS, THETA = 1e-5, 100.0


def naive_attention(
    rows: np.ndarray, layout: HeadLayout, head_columns: Sequence[int], norms: Sequence[np.ndarray | None], window: int,
    stored: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:  # fmt: skip
    """What the heads of one sequence see: [L, G * U], padded columns 0.

    Args:
        rows: q in padded columns, k and v, side by side: float32 [L, G * U + 2 * K * H].
        layout: of the heads.
        head_columns: where each head's columns begin.
        norms: of q and k, if there are any.
        window: keys that a token sees; 0 is all.
        stored: gives back what the cache holds of k or v, [L, K, H].
    """
    size, num_columns = layout.head_size, len(layout.grain_heads) * layout.heads_per_grain * layout.head_size
    q = np.stack([rows[:, column : column + size] for column in head_columns], 1)
    k, v = rows[:, num_columns:].reshape(len(rows), 2, -1, size).transpose(1, 0, 2, 3)
    cosine, sine = rope_table(len(rows), size, THETA, RopeScaling())[:, None].transpose(2, 0, 1, 3)
    q, k = (_rotated(_normed(x, norm), cosine, sine) for x, norm in zip((q, k), norms, strict=True))
    k, v = (stored(x).astype(np.float64)[:, list(layout.kv_of_head)] for x in (k, v))
    scores = np.einsum("qnh,knh->nqk", q.astype(np.float64), k) / np.sqrt(size)
    age = np.arange(len(rows))[:, None] - np.arange(len(rows))
    scores[:, (age < 0) | ((age >= window) & (window > 0))] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    heads = np.einsum("nqk,knh->nqh", weights / weights.sum(-1, keepdims=True), v)
    result = np.zeros((len(rows), num_columns))
    for head, column in zip(heads, head_columns, strict=True):
        result[:, column : column + size] = head
    return result


def _normed(x: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
    if weight is None:
        return x
    x = x.astype(np.float64)
    return (x * weight / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)).astype(np.float32)


def _rotated(x: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> np.ndarray:
    first, second = np.split(x, 2, -1)
    return np.concatenate((first * cosine - second * sine, second * cosine + first * sine), -1)
