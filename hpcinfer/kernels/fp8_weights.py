"""What the kernels of CPUs make of fp8 weights: float32 ones, since no CPU multiplies e4m3."""

from hpcinfer.dtypes import dequantise
from hpcinfer.kernels.protocol import Weight

FP8 = "float8_e4m3"
FP8_PRODUCTS = {"fp8_weights": "float32 products"}  # in the numerics profile


def without_fp8(weight: Weight) -> Weight:
    """The weight, an fp8 one as the float32 values that its codes stand for; rows are then not rounded."""
    if weight.dtype != FP8:
        return weight
    return Weight(dequantise(weight.values, weight.dtype, weight.scales), "float32")
