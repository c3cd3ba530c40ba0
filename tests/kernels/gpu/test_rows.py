"""Rows: right against torch and the reference kernels, and no bit from the company of a row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcinfer.kernels import reference_math
from hpcinfer.kernels.reference_quantised import quantise_rows

SPECIAL = torch.tensor([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3e38, -1.0])


@pytest.fixture(scope="module")
def rows(device):
    from hpcinfer.kernels.gpu import rows

    return rows


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=15)
@given(num_rows=st.integers(1, 5), size=st.integers(1, 70), seed=st.integers(0, 99))
def test_norm_is_that_of_the_reference_in_any_company(rows, on_device, num_rows, size, seed):
    x, weight = randn(num_rows, size, seed=seed), randn(size, seed=seed + 1)
    found = rows.rms_norm(on_device(x), on_device(weight), 1e-5, torch.float32).values
    torch.testing.assert_close(found.cpu(), reference_math.rms_norm(x, weight, 1e-5), rtol=1e-5, atol=1e-6)
    order = torch.arange(num_rows, dtype=torch.int32).flip(0)
    some = rows.rms_norm(on_device(x), on_device(weight), 1e-5, torch.float32, on_device(order)).values
    assert torch.equal(some.flip(0), found)
    alone = rows.rms_norm(on_device(x[-1:]), on_device(weight), 1e-5, torch.float32).values
    assert torch.equal(alone[0], found[-1])


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_norm_gives_the_codes_of_what_it_would_give(rows, on_device, dtype):
    x, weight = randn(5, 40), randn(40)
    x[1], x[2, 3], x[3, 0] = 0, np.nan, 3e38
    found = rows.rms_norm(on_device(x), on_device(weight), 1e-5, dtype)
    expected = rows.quantise(rows.rms_norm(on_device(x), on_device(weight), 1e-5, torch.float32).values, 1, dtype)
    assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(found.scales, expected.scales) and found.scales[1] == 0


def test_a_broken_row_spoils_no_other(rows, on_device):
    x, weight = randn(3, 40), randn(40)
    good = rows.rms_norm(on_device(x), on_device(weight), 1e-5, torch.float32).values
    x[1, :3] = torch.tensor([np.nan, np.inf, -np.inf])
    found = rows.rms_norm(on_device(x), on_device(weight), 1e-5, torch.float32).values
    assert torch.equal(found[::2], good[::2]) and found[1].isnan().any()


def test_no_rows_give_no_rows(rows, on_device):
    none, weight = on_device(torch.empty(0, 8)), on_device(torch.ones(8))
    assert rows.rms_norm(none, weight, 1e-5, torch.float32).values.shape == (0, 8)
    assert rows.silu_mul(none, torch.float32).shape == (0, 4)
    assert rows.quantise(none, 2)[0].shape == (0, 8)
    assert rows.embed(weight.view(1, 8), None, on_device(torch.empty(0, dtype=torch.int32))).shape == (0, 8)


@pytest.mark.parametrize("size", [1, 33, 1500])
def test_silu_is_that_of_the_reference(rows, on_device, size):
    gate_up = 20 * randn(2, 2 * size)
    found = rows.silu_mul(on_device(gate_up), torch.float32).cpu()
    expected = reference_math.silu_mul(gate_up[:, :size], gate_up[:, size:])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-30)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_silu_of_large_numbers_is_finite(rows, on_device):
    gate_up = torch.ones(1, 10)
    gate_up[0, :5] = torch.tensor([-1e30, 1e30, 0, -0.0, -90])
    found = rows.silu_mul(on_device(gate_up), torch.float32).cpu()
    assert torch.equal(found, torch.tensor([[0, 1e30, 0, 0, 0]]))


@settings(max_examples=15)
@given(runs=st.integers(1, 3), size=st.integers(1, 50), exponent=st.integers(-40, 30), seed=st.integers(0, 99))
def test_codes_are_those_of_the_reference(rows, on_device, runs, size, exponent, seed):
    x = randn(2, runs * size, seed=seed) * 10.0**exponent
    x[0, : min(size, len(SPECIAL))] = SPECIAL[:size]
    codes, scales = rows.quantise(on_device(x), runs)
    finite = x.nan_to_num(0.0)  # infinities become the largest finite number
    expected = quantise_rows(finite.view(2, runs, size))
    assert torch.equal(codes.cpu().view(2, runs, size), expected[0].to(torch.int8))
    assert torch.equal(scales.cpu(), expected[1].squeeze(-1))


@settings(max_examples=15)
@given(runs=st.integers(1, 3), size=st.integers(1, 50), exponent=st.integers(-38, 30), seed=st.integers(0, 99))
def test_codes_of_e4m3_are_those_of_torch(rows, on_device, runs, size, exponent, seed):
    x = randn(2, runs * size, seed=seed) * 10.0**exponent
    x[0, : min(size, len(SPECIAL))] = SPECIAL[:size]
    codes, scales = rows.quantise(on_device(x), runs, torch.float8_e4m3fn)
    finite = x.nan_to_num(0.0).view(2, runs, size)
    largest = finite.abs().amax(-1, keepdim=True)
    factor = torch.where(largest < 1e-35, 0.0, 448 / largest)
    expected = (finite * factor).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(codes.cpu().view(2, runs, size).view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scales.cpu(), torch.where(largest < 1e-35, 0.0, largest / 448).squeeze(-1))


def test_every_byte_of_e4m3_is_understood(rows, on_device):
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    table = codes.view(torch.float8_e4m3fn).view(-1, 2)
    found = rows.embed(on_device(table), None, on_device(torch.arange(127, dtype=torch.int32)))
    assert torch.equal(found.cpu(), table.float())


def test_ties_are_rounded_to_even(rows, on_device):
    codes, _ = rows.quantise(on_device(torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])), 1)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def test_views_that_begin_anywhere_are_moved(rows, on_device):
    x = on_device(torch.arange(40.0))
    assert rows.aligned(x) is x
    moved = rows.aligned(x[1:])
    assert moved.data_ptr() % 16 == 0 and torch.equal(moved, x[1:])
