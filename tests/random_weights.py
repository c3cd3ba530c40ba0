"""Random weights in every precision that a store may have."""

import numpy as np

from hpcinfer.dtypes import GROUP, round_to
from hpcinfer.kernels.protocol import Weight

DTYPES = ["float32", "bfloat16", "float16", "int8", "float8_e4m3", "int4"]


def random_weight(random, dtype, *shape):
    """A weight [units, outputs, inputs], with the scales of its precision."""
    units, num_out, num_in = shape
    values = random.standard_normal(shape, np.float32) / np.float32(np.sqrt(num_in))
    if dtype == "bfloat16":
        return Weight((values.view(np.uint32) >> 16).astype(np.uint16), dtype)
    if dtype == "float16":
        return Weight(values.astype(np.float16), dtype)
    if dtype == "int8":
        codes = random.integers(-127, 128, shape, np.int8)
        return Weight(codes, dtype, (random.random((units, num_out), np.float32) + 1) / np.float32(127 * num_in**0.5))
    if dtype == "float8_e4m3":
        scales = np.abs(values).max(-1) / np.float32(448)
        return Weight(round_to(values / np.where(scales > 0, scales, 1)[..., None], dtype), dtype, scales)
    if dtype == "int4":
        groups = -(-num_in // GROUP)
        codes = random.integers(0, 256, (units, num_out, groups * GROUP // 2), np.uint8)
        scales = (random.random((units, num_out, groups), np.float32) + 1) / np.float32(8 * num_in**0.5)
        return Weight(codes, dtype, (scales.view(np.uint32) >> 16).astype(np.uint16))
    return Weight(values, dtype)
