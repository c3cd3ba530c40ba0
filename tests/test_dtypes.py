import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.dtypes import all_finite, dequantise, int4_codes, pack_int4, raw_bytes, round_to, to_float32

# the smallest code and half of it, where exponents begin, ties between codes, the largest code, and what is none
EDGES = [2**-9, 2**-10, 3 * 2**-10, 2**-6, 1.0625, 1.1875, 448.0, 464.0, 480.0, 1e30, -0.0, np.inf, -np.inf, np.nan]
BITS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50)


@given(BITS)
def test_rounding_to_bfloat16_is_torchs(bits):
    values = np.array(bits, np.uint32).view(np.float32)
    ours = to_float32(round_to(values, "bfloat16"), "bfloat16")
    theirs = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(ours, theirs)


@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=50))
def test_widening_then_rounding_returns_the_same_value(bits):
    raw = np.array(bits, np.uint16)
    wide = to_float32(raw, "bfloat16")
    keep = ~np.isnan(wide)
    np.testing.assert_array_equal(round_to(wide, "bfloat16")[keep], raw[keep])
    assert all_finite(raw, "bfloat16") == bool(np.isfinite(wide).all())


@given(st.lists(st.floats(-500, 500, width=32) | st.sampled_from(EDGES), min_size=1, max_size=50))
def test_rounding_to_e4m3_is_torchs_but_for_what_is_too_large(values):
    values = np.array(values, np.float32)
    ours = to_float32(round_to(values, "float8_e4m3"), "float8_e4m3")
    theirs = torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(np.signbit(ours), np.signbit(theirs))


def test_every_code_of_e4m3_means_what_torch_says():
    codes = np.arange(256, dtype=np.uint8)
    wide = to_float32(codes, "float8_e4m3")
    np.testing.assert_array_equal(wide, torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy())
    keep = ~np.isnan(wide)
    assert keep.sum() == 254
    np.testing.assert_array_equal(round_to(wide, "float8_e4m3")[keep], codes[keep])


def test_float32_is_not_copied():
    values = np.ones(3, np.float32)
    assert to_float32(values, "float32") is values


def test_raw_bytes_is_a_view():
    values = np.zeros((2, 3), np.float32)
    raw_bytes(values)[0] = 255
    assert values.tobytes()[0] == 255
    assert len(raw_bytes(np.zeros((0, 3), np.uint16))) == 0


@given(st.integers(1, 5), st.integers(0, 40), st.randoms(use_true_random=False))
def test_packed_int4_codes_come_back(rows, pairs, choose):
    codes = np.array([[choose.randrange(-8, 8) for _ in range(2 * pairs)] for _ in range(rows)], np.int8)
    codes = codes.reshape(rows, 2 * pairs)
    packed = pack_int4(codes)
    assert packed.shape == (rows, pairs) and packed.dtype == np.uint8
    np.testing.assert_array_equal(int4_codes(packed), codes)


def test_even_inputs_of_int4_are_in_the_low_half():
    assert pack_int4(np.array([[-8, 7, 0, 1]], np.int8)).tolist() == [[0xF0, 0x98]]


def test_dequantised_values_are_codes_times_scales():
    codes = np.arange(-4, 4, dtype=np.int8).reshape(1, 2, 4)
    np.testing.assert_array_equal(dequantise(codes, "int8", np.float32([[0.5, -2]])), codes * [[[0.5], [-2]]])
    bytes_ = round_to(codes.astype(np.float32), "float8_e4m3")
    np.testing.assert_array_equal(dequantise(bytes_, "float8_e4m3", np.float32([[0.5, -2]])), codes * [[[0.5], [-2]]])
    codes = np.tile(np.arange(-8, 8, dtype=np.int8), 4).reshape(1, 1, 64)
    scales = round_to(np.float32([[[0.5, -3]]]), "bfloat16")
    expected = codes.reshape(2, 32) * np.float32([[0.5], [-3]])
    np.testing.assert_array_equal(dequantise(pack_int4(codes), "int4", scales).reshape(2, 32), expected)
    np.testing.assert_array_equal(dequantise(np.uint16([0x3F80]), "bfloat16", None), np.float32([1]))
