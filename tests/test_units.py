import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.errors import ConfigError
from hpcinfer.units import format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(("text", "size"), [
    ("0", 0), ("4096", 4096), ("10B", 10), ("1k", 1024), ("512MiB", 512 << 20), ("512mib", 512 << 20),
    ("4GiB", 4 << 30),
    ("4G", 4 << 30), ("2 TiB", 2 << 40), (" 1.5 KiB ", 1536), ("3KB", 3000), ("1GB", 10**9), ("1e3", 1000),
])  # fmt: skip
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_bytes(text) == size


MALFORMED = ["", "GiB", "lots", "4XB", "4 Gi B", "-1", "-4GiB", "1e999", "inf", "nan", "4GiBB", "0x10", "1,5G"]


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_sizes_are_refused_with_an_example(text):
    with pytest.raises(ConfigError) as caught:
        parse_bytes(text)
    assert caught.value.found == f"size {text!r}" and "512MiB" in caught.value.expected


@pytest.mark.parametrize(("size", "text"), [
    (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (3 << 50, "3072.0 TiB"),
    (-2048, "-2.0 KiB"),
])  # fmt: skip
def test_sizes_are_written_with_binary_units(size, text):
    assert format_bytes(size) == text


@given(size=st.integers(0, 2**60))
def test_written_sizes_are_read_again(size):
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.06)


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0.0 s"), (12.34, "12.3 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (65, "1 min 05 s"),
    (119.7, "2 min 00 s"),
    (3599.9, "1 h 00 min"), (12000, "3 h 20 min"), (100 * 3600, "100 h 00 min"),
])  # fmt: skip
def test_durations_carry_units_and_never_sixty(seconds, text):
    assert format_seconds(seconds) == text
