import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.kernels import reference_math as math
from hpcinfer.kernels.logarithm import log

NUMBERS = np.concatenate([np.linspace(-100, 88.7, 100_003), np.linspace(-1, 1, 1001), [0.0, -0.0]]).astype(np.float32)


def test_exp_is_within_two_ulp():
    found = math.exp_(torch.from_numpy(NUMBERS.copy())).numpy().astype(np.float64)
    expected = np.exp(NUMBERS.astype(np.float64))
    is_normal = NUMBERS >= -86.5
    ulp = np.spacing(expected[is_normal].astype(np.float32))
    assert (np.abs(found - expected)[is_normal] <= 2 * ulp).all()
    assert (found[~is_normal] == 0).all()


def test_exp_of_special_values():
    found = math.exp_(torch.tensor([0.0, -0.0, -torch.inf, torch.inf, 90.0, torch.nan])).tolist()
    assert found[:5] == [1.0, 1.0, 0.0, np.inf, np.inf] and np.isnan(found[5])


@given(start=st.integers(0, 70), length=st.integers(0, 300), stride=st.integers(1, 5))
def test_exp_depends_on_nothing_but_the_number(start, length, stride):
    everything = math.exp_(torch.from_numpy(NUMBERS.copy()))
    part = torch.from_numpy(NUMBERS.copy())[start : start + length * stride : stride].contiguous()
    assert torch.equal(math.exp_(part), everything[start : start + length * stride : stride])


def test_log_is_within_an_ulp():
    numbers = np.exp(np.random.default_rng(0).uniform(-700, 700, 50_000))
    np.testing.assert_array_max_ulp(log(numbers), np.log(numbers), 2)
    np.testing.assert_array_equal(log(np.array([0.0, 1.0, np.inf, -1.0])), [-np.inf, 0.0, np.inf, np.nan])


def _tree_sum(values):
    if len(values) == 1:
        return values[0]
    half = 1 << ((len(values) - 1).bit_length() - 1)
    padded = np.concatenate([values, np.zeros(2 * half - len(values), np.float32)])
    return _tree_sum(padded[:half] + padded[half:])


@given(size=st.integers(1, 300), rows=st.integers(1, 5))
def test_tree_sum_adds_halves(size, rows):
    x = np.random.default_rng(size).random((rows, size), np.float32)
    found = math.tree_sum_(torch.from_numpy(x.copy())).numpy()
    assert found.tolist() == [_tree_sum(row) for row in x]


@pytest.mark.parametrize("size", [1, 24, 64, 100, 257])
def test_rms_norm_of_a_row_is_the_same_in_any_batch(size):
    random = torch.Generator().manual_seed(size)
    x, weight = torch.randn(37, size, generator=random) * 3, torch.randn(size, generator=random)
    found = math.rms_norm(x, weight, 1e-5)
    wide = x.double()
    expected = wide * weight / torch.sqrt((wide**2).mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    for row in (0, 5, 36):
        assert torch.equal(math.rms_norm(x[row : row + 1], weight, 1e-5)[0], found[row])


def test_silu_mul_of_an_element_is_the_same_in_any_shape():
    random = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(3, 37, 19, generator=random) * 20 for _ in range(2))
    found = math.silu_mul(gate, up)
    expected = gate.double() * torch.sigmoid(gate.double()) * up
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(math.silu_mul(gate[1:2, 3:10, 5:6], up[1:2, 3:10, 5:6]), found[1:2, 3:10, 5:6])
    assert torch.equal(math.silu_mul(gate.transpose(0, 2), up.transpose(0, 2)), found.transpose(0, 2))
