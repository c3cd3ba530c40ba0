"""Elementwise functions and sums whose bits depend on nothing but their operands.

Everything is built from operations that IEEE 754 rounds exactly (add, multiply, divide, square root, rounding), one
torch or numpy call each, so that neither vector width nor position, length or stride can matter.
"""

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 16  # elements that exp works on at once, to stay in cache
_LOG2_E = 1.44269504088896341
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # the high part times an exponent is exact
_SMALLEST = -86.5  # exp of less is 0, so that no result is subnormal
# exp(r) = 1 + r + r^2 P(r) for |r| <= ln(2) / 2. Source: Cephes, expf.c
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def exp_(x: Tensor) -> Tensor:
    """Exponential of a contiguous float32 tensor, in place; exact at 0, error below 2 ulp, 0 below -86.5."""
    parts = (x,) if x.numel() <= _CHUNK else x.view(-1).split(_CHUNK)
    for part in parts:
        _exp_part_(part)
    return x


def _exp_part_(x: Tensor) -> None:
    is_zero = x < _SMALLEST
    exponent = torch.mul(x, _LOG2_E).clamp_(-125, 128).round_()
    term = torch.mul(exponent, _LN2_HIGH)
    x.sub_(term).sub_(torch.mul(exponent, _LN2_LOW, out=term))
    value = torch.mul(x, _EXP[0], out=term)
    for coefficient in _EXP[1:]:
        value.add_(coefficient).mul_(x)
    value.mul_(x).add_(x).add_(1)
    half_power = exponent.add_(126).mul_(2.0**23).to(torch.int32).view(torch.float32)  # 2 ** (exponent - 1), as bits
    torch.mul(value, half_power, out=x)
    x.mul_(2).masked_fill_(is_zero, 0)


def tree_sum_(x: Tensor) -> Tensor:
    """Sum over the last axis (at least 1 long) by adding halves of the next power of two; overwrites x."""
    size = x.shape[-1]
    while size > 1:
        half = 1 << ((size - 1).bit_length() - 1)
        x[..., : size - half].add_(x[..., half:size])
        size = half
    return x[..., 0]


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up, contiguous."""
    decay = exp_(gate.abs().neg_().contiguous())
    value = torch.where(gate >= 0, 1.0, decay).mul_(gate)
    return value.div_(decay.add_(1)).mul_(up)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * weight / sqrt(mean(x ** 2) + eps) over the last axis."""
    squares = tree_sum_(x * x).numpy()  # numpy's square root and division round exactly; torch promises it for neither
    scale = np.float32(1) / np.sqrt(squares / np.float32(x.shape[-1]) + np.float32(eps))
    return torch.mul(x, torch.from_numpy(scale).unsqueeze(-1)).mul_(weight)
