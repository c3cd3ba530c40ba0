"""Products with quantised weights: rows are quantised too, and sums of codes are exact whatever their order.

A run of a row (all of it, or a grain of it) has one scale: its largest magnitude is 127. Sums of products of codes are
integers far below 2 ** 53, so that float64 products are exact; what is rounded has one order.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpcinfer.dtypes import GROUP, int4_codes, to_float32
from hpcinfer.kernels.protocol import Weight

_TINY = 1e-35  # rows below are zero: 127 / x must stay finite


@dataclass(frozen=True)
class QuantisedWeight:
    """Codes of a weight; inputs of int4 are padded to whole groups."""

    codes: Tensor  # float64 [G, O, I], integers
    scales: Tensor  # float32: int8 [G, O]; int4 [G, O, I / GROUP]
    num_in: int  # without padding

    @property
    def num_out(self) -> int:
        """Outputs of each grain."""
        return self.codes.shape[1]


def prepare_quantised(weight: Weight, num_in: int) -> QuantisedWeight:
    """Copy a stored weight of `num_in` inputs."""
    assert weight.scales is not None
    codes = int4_codes(weight.values) if weight.dtype == "int4" else weight.values
    scales = to_float32(weight.scales, "bfloat16") if weight.dtype == "int4" else weight.scales
    return QuantisedWeight(torch.from_numpy(codes.astype(np.float64)), torch.from_numpy(np.array(scales)), num_in)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (float32 integers) and scales [..., 1] of the runs along the last axis; zeros have the scale 0."""
    finite = x.nan_to_num(0.0)
    largest = finite.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    is_zero = largest < _TINY
    factor = torch.where(is_zero, 0.0, 127 / largest)
    return torch.round(finite * factor).clamp_(-127, 127), torch.where(is_zero, 0.0, largest / 127)


def quantised_products(x: Tensor, weight: QuantisedWeight) -> Tensor:
    """[G or 1, T, I] gives [G, T, O]: each grain of the weight times its rows, or the same rows for all."""
    codes, row_scales = quantise_rows(x)
    codes = torch.nn.functional.pad(codes, (0, weight.codes.shape[2] - x.shape[2])).double()
    if weight.scales.dim() == 2:
        sums = torch.matmul(codes, weight.codes.transpose(1, 2)).float()
        return sums.mul_(weight.scales.unsqueeze(1)).mul_(row_scales)
    result = torch.zeros(weight.codes.shape[0], x.shape[1], weight.num_out)
    for group in range(weight.scales.shape[2]):
        inputs = slice(group * GROUP, (group + 1) * GROUP)
        sums = torch.matmul(codes[..., inputs], weight.codes[..., inputs].transpose(1, 2)).float()
        result.add_(sums.mul_(weight.scales[:, None, :, group]))
    return result.mul_(row_scales)
