import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.dtypes import all_finite, raw_bytes, round_to, to_float32

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


def test_float32_is_not_copied():
    values = np.ones(3, np.float32)
    assert to_float32(values, "float32") is values


def test_raw_bytes_is_a_view():
    values = np.zeros((2, 3), np.float32)
    raw_bytes(values)[0] = 255
    assert values.tobytes()[0] == 255
    assert len(raw_bytes(np.zeros((0, 3), np.uint16))) == 0
