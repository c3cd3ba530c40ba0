import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.dtypes import GROUP, dequantise, int4_codes, round_to, to_float32
from hpcinfer.weights import quantise as module
from hpcinfer.weights.quantise import error_factor, padded_inputs, quantise

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 100))
WIDTHS = st.sampled_from([1e-30, 1e-3, 1.0, 1e20])  # of the weights


def random_unit(shape, width=1.0, seed=0):
    unit = np.random.default_rng(seed).normal(size=shape) * width
    unit[0] = 0
    return unit.astype(np.float32)


def grouped(unit):
    padded = np.zeros((len(unit), padded_inputs(unit.shape[1])))
    padded[:, : unit.shape[1]] = unit
    return padded.reshape(len(unit), -1, GROUP)


@given(SHAPES, WIDTHS)
def test_int8_is_within_half_a_step_of_every_weight(shape, width):
    unit = random_unit(shape, width)
    values, scales = quantise(unit, "int8")
    assert values.dtype == np.int8 and scales.dtype == np.float32 and scales.shape == shape[:1]
    assert np.abs(values.astype(int)).max(axis=1).tolist() == [0] + [127] * (len(unit) - 1)
    back = dequantise(values, "int8", scales)
    assert (np.abs(back - unit.astype(np.float64)) <= 0.5001 * scales[:, None]).all()
    assert scales[0] == 0 and not back[0].any()


@given(SHAPES, WIDTHS)
def test_fp8_is_within_half_a_step_of_every_weight(shape, width):
    unit = random_unit(shape, width)
    values, scales = quantise(unit, "float8_e4m3")
    assert values.dtype == np.uint8 and scales.dtype == np.float32 and scales.shape == shape[:1]
    assert np.abs(to_float32(values, "float8_e4m3")).max(axis=1).tolist() == [0] + [448] * (len(unit) - 1)
    errors = np.abs(dequantise(values, "float8_e4m3", scales) - unit.astype(np.float64))
    steps = np.maximum(np.abs(unit) / 8, scales[:, None] * 2.0**-9)  # three bits of mantissa, or the smallest code
    assert (errors <= 0.5001 * steps).all() and scales[0] == 0


@given(SHAPES, WIDTHS)
def test_int4_is_no_worse_than_rounding_with_the_full_range(shape, width):
    unit = random_unit(shape, width)
    values, scales = quantise(unit, "int4")
    assert values.dtype == np.uint8 and values.shape == (shape[0], padded_inputs(shape[1]) // 2)
    assert scales.dtype == np.uint16 and scales.shape == (shape[0], padded_inputs(shape[1]) // GROUP)
    groups = grouped(unit)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    step = to_float32(round_to((largest / 7).astype(np.float32), "bfloat16"), "bfloat16").astype(np.float64)
    plain = np.where(step > 0, np.rint(groups / np.where(step > 0, step, 1)).clip(-8, 7) * step, 0)
    errors = grouped(dequantise(values, "int4", scales)) - groups
    assert (np.square(errors).sum(-1) <= np.square(plain - groups).sum(-1) * 1.0001).all()
    is_unclipped = np.abs(int4_codes(values).reshape(groups.shape)) < 7
    steps = np.abs(to_float32(scales, "bfloat16"))[..., None]
    assert (np.abs(errors) <= 0.5001 * steps)[is_unclipped].all()


@given(SHAPES)
def test_int4_padding_and_zero_rows_are_zero(shape):
    values, scales = quantise(random_unit(shape), "int4")
    assert not int4_codes(values)[:, shape[1] :].any()
    assert not scales[0].any() and (values[0] == 0x88).all()


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3", "int4"])
def test_weights_below_the_smallest_scale_become_zero(kind):
    unit = np.full((1, 32), 1e-45, np.float32)
    assert not dequantise(*(lambda q: (q.values, kind, q.scales))(quantise(unit, kind))).any()


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3", "int4"])
def test_outputs_do_not_depend_on_each_other(kind, monkeypatch):
    unit, factor = random_unit((9, 50)), error_factor(moments_of(50)) if kind == "int4" else None
    whole = quantise(unit, kind, factor)
    monkeypatch.setattr(module, "_ROWS", 2)
    for some, all_ in zip(quantise(unit, kind, factor), whole, strict=True):
        np.testing.assert_array_equal(some, all_)


def moments_of(size, seed=1):
    """Second moments of inputs that depend on each other."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(400, size)) @ generator.normal(size=(size, size))
    return x.T @ x


def output_error(unit, moments, factor):
    values, scales = quantise(unit, "int4", factor)
    errors = dequantise(values, "int4", scales)[:, : unit.shape[1]] - unit
    return float(np.einsum("oi,ij,oj->", errors, moments, errors))


@pytest.mark.parametrize("size", [20, 64, 150, 300])
def test_error_factor_lowers_the_error_of_outputs(size):
    unit, moments = random_unit((40, size)), moments_of(size)
    assert output_error(unit, moments, error_factor(moments)) < 0.7 * output_error(unit, moments, None)


@pytest.mark.parametrize("moments", [np.eye(70), np.zeros((70, 70))], ids=["alike", "never seen"])
def test_independent_inputs_are_rounded_to_nearest(moments):
    unit = random_unit((10, 70))
    for one, other in zip(quantise(unit, "int4", error_factor(moments)), quantise(unit, "int4"), strict=True):
        np.testing.assert_array_equal(one, other)


def test_moments_of_few_inputs_are_enough():
    x = np.random.default_rng(0).normal(size=(3, 64))
    factor = error_factor(x.T @ x)
    assert np.isfinite(factor).all() and (np.diag(factor) > 0).all()
    unit = random_unit((10, 64))
    assert output_error(unit, x.T @ x, factor) < output_error(unit, x.T @ x, None)
