"""Rows of the native kernels: right against float64, and the same bits for any threads, vectors, lengths and places."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcinfer.dtypes import round_to, to_float32
from hpcinfer.kernels import reference_math
from hpcinfer.kernels.reference import ReferenceKernels

native = pytest.importorskip("hpcinfer.kernels.native._native", reason="the native kernels are not built")
ffi, lib = native.ffi, native.lib

ISAS = ffi.string(lib.hpc_isas()).decode().split()
GROUP = lib.HPC_GROUP
GUARD = 7777.0
UNTOUCHED = 12345
NUMBERS = np.concatenate([np.linspace(-100, 88.7, 100_003), np.linspace(-1, 1, 1001), [0.0, -0.0]]).astype(np.float32)
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3e38, -1.0], np.float32)
RUNTIMES = {threads: ffi.gc(lib.hpc_runtime_new(threads), lib.hpc_runtime_free) for threads in (1, 2, 3)}

lengths = st.integers(1, 70)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def _best_instructions():
    yield
    lib.hpc_use(ISAS[0].encode())


def moved(array, places):
    """A copy of an array that begins `places` elements after an aligned address, with guards around it."""
    memory = np.empty(array.size + places + 64, array.dtype)
    memory.fill(GUARD if array.dtype.kind == "f" else 77)
    part = memory[places + 16 : places + 16 + array.size].reshape(array.shape)
    part[...] = array
    return memory, part


def guards_hold(memory, part):
    """Whether nothing around the part was written."""
    outside = np.ones(memory.size, bool)
    start = (part.ctypes.data - memory.ctypes.data) // memory.itemsize
    outside[start : start + part.size] = False
    return bool((memory[outside] == (GUARD if memory.dtype.kind == "f" else 77)).all())


def pointer(array, kind="float"):
    return ffi.NULL if array is None else ffi.from_buffer(f"{kind}[]", array)


class Rows:
    """An hpc_rows of our own: float32 or codes."""

    def __init__(self, num_rows, grains, num_in, *, quantised, places=0, is_for_int8=False):
        padded = -(-num_in // GROUP) * GROUP
        self.struct = ffi.new("hpc_rows *", {"num_rows": num_rows, "grains": grains, "num_in": num_in,
                                             "padded_in": padded, "stride": grains * num_in,
                                             "is_for_int8": is_for_int8})
        shapes = {"values": ((num_rows, grains, num_in), np.float32)}
        if quantised:
            code_bytes = 2 if is_for_int8 else 1  # at most: instruction sets have their own
            shapes = {"codes": ((num_rows, grains, padded * code_bytes), np.int8),
                      "scales": ((num_rows, grains), np.float32),
                      "sums": ((num_rows, grains, padded // GROUP + 1), np.int32)}
        self.parts = {name: moved(np.empty(*shape), places) for name, shape in shapes.items()}
        kinds = {"codes": "int8_t", "sums": "int32_t"}
        for name, (_, part) in self.parts.items():
            setattr(self.struct, name, pointer(part, kinds.get(name, "float")))

    def results(self):
        assert all(guards_hold(*memory) for memory in self.parts.values())
        return {name: part.copy() for name, (_, part) in self.parts.items()}


def everywhere(function):
    """Run with every instruction set, number of threads and some alignments; the bits must be the same."""
    results = []
    for isa in ISAS:
        assert lib.hpc_use(isa.encode())
        results += [function(RUNTIMES[threads], places) for threads, places in ((1, 0), (2, 1), (3, 5))]
    for result in results[1:]:
        assert result.keys() == results[0].keys()
        for name, array in result.items():
            assert array.tobytes() == results[0][name].tobytes(), name
    return results[0]


def rms_norm(x, weight, index, eps, *, quantised):
    def run(runtime, places):
        rows = Rows(len(x) if index is None else len(index), 1, x.shape[1], quantised=quantised, places=places)
        (_, x_moved), (_, weight_moved) = moved(x, places), moved(weight, places)
        lib.hpc_rms_norm(runtime, pointer(x_moved), pointer(index, "int64_t"), pointer(weight_moved), eps, rows.struct)
        return rows.results()

    return everywhere(run)


def quantise(values, *, is_for_int8=False):
    def run(runtime, places):
        rows = Rows(*values.shape, quantised=True, places=places, is_for_int8=is_for_int8)
        if is_for_int8:
            rows.parts["sums"][1][..., :-1] = UNTOUCHED
        _, part = moved(values, places)
        lib.hpc_quantise(runtime, pointer(part), rows.struct)
        results = rows.results()
        return {name: part for name, part in results.items() if name != "codes"} if is_for_int8 else results

    return everywhere(run)


def exp(values):
    def run(runtime, places):
        memory, part = moved(values, places)
        lib.hpc_exp(runtime, pointer(part), part.size)
        assert guards_hold(memory, part)
        return {"": part}

    return everywhere(run)[""]


def expected_codes(values):
    """The definition of quantised runs, for finite numbers."""
    largest = np.abs(values).max(-1, keepdims=True, initial=np.float32(0))
    is_zero = largest < np.float32(1e-35)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        factor = np.where(is_zero, np.float32(0), np.float32(127) / largest)
        codes = np.clip(np.rint(values * factor), -127, 127).astype(np.int8)
    padded = np.zeros((*values.shape[:-1], -(-values.shape[-1] // GROUP) * GROUP), np.int8)
    padded[..., : values.shape[-1]] = codes
    groups = padded.reshape(*values.shape[:-1], padded.shape[-1] // GROUP, GROUP).sum(-1, dtype=np.int32)
    sums = np.concatenate((groups, groups.sum(-1, keepdims=True, dtype=np.int32)), -1)
    return {"codes": padded, "scales": np.where(is_zero, np.float32(0), largest / np.float32(127))[..., 0],
            "sums": sums}


def assert_codes(found, expected):
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def random_rows(seed, *shape):
    random = np.random.default_rng(seed)
    return (random.standard_normal(shape) * 10.0 ** random.uniform(-3, 3, (*shape[:-1], 1))).astype(np.float32)


def test_exp_is_within_two_ulp():
    found, expected = exp(NUMBERS).astype(np.float64), np.exp(NUMBERS.astype(np.float64))
    is_normal = NUMBERS >= -86.5
    ulp = np.spacing(expected[is_normal].astype(np.float32))
    assert (np.abs(found - expected)[is_normal] <= 2 * ulp).all()
    assert (found[~is_normal] == 0).all()


def test_exp_of_special_values():
    found = exp(np.array([0.0, -0.0, -np.inf, np.inf, 90.0, np.nan], np.float32))
    np.testing.assert_array_equal(found, [1, 1, 0, np.inf, np.inf, np.nan])


@given(start=st.integers(0, 70), length=st.integers(0, 300))
@settings(deadline=None, max_examples=30)
def test_exp_depends_on_nothing_but_the_number(start, length):
    part = NUMBERS[start * 1000 :][:length]
    np.testing.assert_array_equal(exp(part), exp(NUMBERS)[start * 1000 :][:length])


@given(seed=seeds, num_rows=st.integers(0, 9), size=lengths)
@settings(deadline=None, max_examples=60)
def test_norm_of_any_length(seed, num_rows, size):
    x, weight = random_rows(seed, num_rows, size), random_rows(seed + 1, size)
    found = rms_norm(x, weight, None, 1e-5, quantised=False)["values"][:, 0]
    wide = x.astype(np.float64)
    expected = wide * weight / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-30)
    assert_codes(rms_norm(x, weight, None, 1e-5, quantised=True), expected_codes(found[:, None]))


def test_norm_takes_the_rows_that_are_named():
    x, weight, index = random_rows(0, 5, 100), random_rows(1, 100), np.array([4, 0, 0, 2])
    everything = rms_norm(x, weight, None, 1e-5, quantised=False)["values"]
    found = rms_norm(x, weight, index, 1e-5, quantised=False)["values"]
    np.testing.assert_array_equal(found, everything[index])


def test_a_broken_row_spoils_no_other():
    x, weight = random_rows(0, 5, 100), random_rows(1, 100)
    good = rms_norm(x, weight, None, 1e-5, quantised=True)
    x[2, 7], x[2, 8], x[2, 9] = np.nan, np.inf, -np.inf
    found = rms_norm(x, weight, None, 1e-5, quantised=True)
    for name, array in good.items():
        np.testing.assert_array_equal(np.delete(found[name], 2, 0), np.delete(array, 2, 0))


@given(seed=seeds, num_rows=st.integers(0, 4), grains=st.integers(1, 3), size=lengths)
@settings(deadline=None, max_examples=60)
def test_quantised_rows_are_what_is_defined(seed, num_rows, grains, size):
    values = random_rows(seed, num_rows, grains, size)
    assert_codes(quantise(values), expected_codes(values))


def test_rows_for_int8_have_the_same_scales_and_totals_without_the_sums_of_groups():
    values = random_rows(3, 5, 2, 100)
    found, expected = quantise(values, is_for_int8=True), quantise(values)
    assert (found["sums"][..., :-1] == UNTOUCHED).all()
    np.testing.assert_array_equal(found["sums"][..., -1], expected["sums"][..., -1])
    np.testing.assert_array_equal(found["scales"], expected["scales"])


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-38, 2e-35, 1e38])
def test_quantised_extremes(scale):
    values = random_rows(3, 2, 1, 50)
    values = values / np.abs(values).max(-1, keepdims=True) * np.float32(scale)
    found = quantise(values)
    assert_codes(found, expected_codes(values))
    assert (np.abs(found["codes"]).max() == 127) == (scale > 1e-35)


def test_ties_are_rounded_to_even():
    values = np.array([[[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]]], np.float32)
    assert quantise(values)["codes"][0, 0, :7].tolist() == [127, 0, 2, 2, 0, -2, -2]


def test_codes_of_broken_values_are_finite_and_the_padding_stays_zero():
    values = np.tile(SPECIAL, (3, 1, 1))
    values[1, 0, :4], values[2, 0, :] = 1.0, np.nan
    found = quantise(values)
    assert (np.abs(found["codes"].astype(int)) <= 127).all() and not found["codes"][..., 8:].any()
    np.testing.assert_array_equal(found["sums"][..., -1], found["codes"].sum(-1, dtype=np.int32))


def embed(table, dtype, scales, starts, sizes, ids):
    def run(runtime, places):
        memory, out = moved(np.empty((len(ids), table.shape[2]), np.float32), places)
        starts_array, sizes_array = (np.array(each, np.int64) for each in (starts, sizes))
        lib.hpc_embed(
            runtime, getattr(lib, f"HPC_{dtype.upper()}"), pointer(moved(table, places)[1], "char"), pointer(scales),
            table.shape[1], table.shape[2], pointer(starts_array, "int64_t"), pointer(sizes_array, "int64_t"),
            len(starts), pointer(ids, "int64_t"), len(ids), pointer(out),
        )  # fmt: skip
        assert guards_hold(memory, out)
        return {"": out}

    return everywhere(run)[""]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("size", [1, 16, 70])
def test_embedding_widens_its_rows_exactly(dtype, size):
    random = np.random.default_rng(size)
    scales, values = None, random.standard_normal((2, 6, size), np.float32)
    values[0, 0, 0] = -0.0
    if dtype == "int8":
        scales = random.random((2, 6), np.float32)
        table = random.integers(-127, 128, values.shape, np.int8)
        wide = table.astype(np.float32) * scales[..., None]
    else:
        table = round_to(values, dtype)
        wide = to_float32(table, dtype)
    ids = np.array([4, 0, 3, 9, 10, 13, 16, 2])  # 4, 9 and 16 are foreign: the sizes below leave them out
    found = embed(table, dtype, scales, (0, 10), (4, 6), ids)
    expected = np.zeros((len(ids), size), np.float32)
    for row, (grain, place) in {1: (0, 0), 2: (0, 3), 4: (1, 0), 5: (1, 3), 7: (0, 2)}.items():
        expected[row] = wide[grain, place]
    np.testing.assert_array_equal(found, expected)
    assert not np.signbit(found[found == 0]).any()


def test_smallest_and_largest_float16_are_widened_exactly():
    codes = np.arange(0x7C00, dtype=np.uint16).view(np.float16).reshape(1, 31, 1024)  # all that are finite
    ids = np.arange(31)
    np.testing.assert_array_equal(embed(codes, "float16", None, (0,), (31,), ids), codes[0].astype(np.float32))


@given(seed=seeds, num_rows=st.integers(0, 4), size=lengths, has_bias=st.booleans())
@settings(deadline=None, max_examples=30)
def test_residual_is_added_in_place(seed, num_rows, size, has_bias):
    x, total, bias = random_rows(seed, num_rows, size), random_rows(seed + 1, num_rows, size), random_rows(seed, size)
    bias = bias if has_bias else None

    def run(runtime, places):
        memory, out = moved(x, places)
        lib.hpc_add_residual(
            runtime, pointer(out), pointer(moved(total, places)[1]), pointer(bias), num_rows, size, pointer(out)
        )
        assert guards_hold(memory, out)
        return {"": out}

    np.testing.assert_array_equal(everywhere(run)[""], x + (total if bias is None else total + bias))


def argmax(logits, sizes):
    def run(runtime, places):
        values, best = np.empty(len(logits), np.float32), np.empty(len(logits), np.int64)
        lib.hpc_argmax(
            runtime, pointer(moved(logits, places)[1]), pointer(np.array(sizes, np.int64), "int64_t"), *logits.shape,
            pointer(values), pointer(best, "int64_t"),
        )  # fmt: skip
        return {"values": values, "places": best}

    return everywhere(run)


@given(seed=seeds, num_rows=st.integers(0, 4), grains=st.integers(1, 3), size=lengths, data=st.data())
@settings(deadline=None, max_examples=60)
def test_argmax_is_the_reference_one(seed, num_rows, grains, size, data):
    sizes = tuple(data.draw(st.lists(st.integers(0, size), min_size=grains, max_size=grains)))
    random = np.random.default_rng(seed)
    logits = random.integers(-3, 4, (num_rows, grains, size)).astype(np.float32)  # many ties, and what is special
    logits[random.random(logits.shape) < 0.3] = np.nan
    logits[random.random(logits.shape) < 0.3] = -np.inf
    found, expected = argmax(logits, sizes), ReferenceKernels().argmax(logits, sizes)
    np.testing.assert_array_equal(found["places"], expected.places)
    np.testing.assert_array_equal(found["values"], expected.values)


def grain_stats(logits, sizes):
    def run(runtime, places):
        maxima, sums = (np.empty(logits.shape[:2], np.float32) for _ in range(2))
        lib.hpc_grain_stats(
            runtime, pointer(moved(logits, places)[1]), pointer(np.array(sizes, np.int64), "int64_t"), *logits.shape,
            pointer(maxima), pointer(sums),
        )  # fmt: skip
        return {"maxima": maxima, "sums": sums}

    return everywhere(run)


@given(seed=seeds, num_rows=st.integers(0, 4), size=lengths)
@settings(deadline=None, max_examples=60)
def test_exp_sums_leave_out_padded_columns(seed, num_rows, size):
    sizes = (size, 0, size // 2)
    logits = random_rows(seed, num_rows, 3, size) / 50
    logits[:, 0, ::3] = -np.inf
    padded = logits.copy()
    padded[:, 1:, size // 2 :] = np.nan
    padded[:, 1] = np.nan
    found, expected = grain_stats(padded, sizes), ReferenceKernels().grain_stats(logits, sizes)
    np.testing.assert_array_equal(found["maxima"], expected.maxima)
    np.testing.assert_allclose(found["sums"], expected.exp_sums, rtol=1e-5)


def largest(row, count):
    places = np.full(count + 1, -7, np.int64)
    lib.hpc_largest(RUNTIMES[1], pointer(row), len(row), count, pointer(places, "int64_t"))
    assert places[count] == -7
    return places[:count]


@given(values=st.lists(st.sampled_from([*SPECIAL.tolist(), 1.0, 2.0, 3.0]), max_size=100), data=st.data())
@settings(deadline=None)
def test_largest_are_those_of_a_full_sort(values, data):
    row = np.array(values, np.float32)
    count = data.draw(st.integers(0, len(row)))
    expected = np.argsort(-row, kind="stable")[:count]
    for isa in ISAS:
        lib.hpc_use(isa.encode())
        np.testing.assert_array_equal(largest(row, count), expected)


def test_largest_of_a_long_row():
    row = np.random.default_rng(0).standard_normal(30_000, np.float32).round(2)
    for count in (1, 50, 30_000):
        np.testing.assert_array_equal(largest(row, count), np.argsort(-row, kind="stable")[:count])


def test_the_norm_is_close_to_the_reference():
    x = torch.from_numpy(random_rows(0, 6, 96))
    weight = torch.from_numpy(random_rows(1, 96))
    found = rms_norm(x.numpy(), weight.numpy(), None, 1e-6, quantised=False)["values"][:, 0]
    np.testing.assert_allclose(found, reference_math.rms_norm(x, weight, 1e-6).numpy(), rtol=1e-6)
