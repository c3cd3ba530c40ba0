"""Quantised products against plain integers."""

import numpy as np
import pytest
import torch

from hpcinfer.dtypes import GROUP, dequantise, to_float32
from hpcinfer.kernels.protocol import Weight
from hpcinfer.kernels.reference_quantised import prepare_quantised, quantise_rows, quantised_products


def random_weight(dtype, units, num_out, num_in):
    random = np.random.default_rng(0)
    if dtype == "int8":
        codes = random.integers(-127, 128, (units, num_out, num_in), np.int8)
        return Weight(codes, dtype, random.random((units, num_out), np.float32))
    groups = -(-num_in // GROUP)
    codes = random.integers(0, 256, (units, num_out, groups * GROUP // 2), np.uint8)
    scales = (random.random((units, num_out, groups), np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return Weight(codes, dtype, scales)


@pytest.mark.parametrize("num_rows", [0, 1, 7])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_products_are_those_of_what_codes_stand_for(dtype, num_rows):
    weight, num_in = random_weight(dtype, 2, 5, 70), 70
    x = torch.randn(2, num_rows, num_in, generator=torch.Generator().manual_seed(1))
    codes, scales = quantise_rows(x)
    rounded = (codes.double() * scales.double()).numpy()
    stands_for = dequantise(weight.values, dtype, weight.scales)[..., :num_in].astype(np.float64)
    expected = np.einsum("gti,goi->gto", rounded, stands_for)
    found = quantised_products(x, prepare_quantised(weight, num_in))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_int8_products_are_exact_integers_rounded_once():
    weight = random_weight("int8", 1, 9, 300)
    x = torch.randn(1, 4, 300, generator=torch.Generator().manual_seed(2))
    codes, scales = quantise_rows(x)
    sums = np.einsum("gti,goi->gto", codes.numpy().astype(np.int64), weight.values.astype(np.int64))
    expected = sums.astype(np.float32) * weight.scales[:, None] * scales.numpy()
    assert np.array_equal(quantised_products(x, prepare_quantised(weight, 300)).numpy(), expected)


def test_rows_quantise_to_their_largest_magnitude():
    codes, scales = quantise_rows(torch.tensor([[1.0, -4.0, 2.0], [0.0, 0.0, 0.0], [torch.nan, 1.0, -1.0]]))
    assert codes.tolist() == [[32, -127, 64], [0, 0, 0], [0, 127, -127]]
    assert scales.tolist() == [[pytest.approx(4 / 127)], [0], [pytest.approx(1 / 127)]]


def test_rows_too_small_for_a_scale_are_zero():
    codes, scales = quantise_rows(torch.tensor([[1e-38, 0.0, 5e-39]]))
    assert codes.tolist() == [[0, 0, 0]] and scales.tolist() == [[0]]


def test_int4_scales_are_bfloat16():
    weight = random_weight("int4", 1, 3, 64)
    assert np.array_equal(prepare_quantised(weight, 64).scales.numpy(), to_float32(weight.scales, "bfloat16"))
