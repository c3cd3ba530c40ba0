"""Products with packed weights: the definitions, and no bit from threads, vectors, other rows, place or alignment."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcinfer.dtypes import GROUP, dequantise, pack_int4, round_to, to_float32
from hpcinfer.partition.grains import Span, grain_runs, subtrees, tree_reduce

native = pytest.importorskip("hpcinfer.kernels.native._native", reason="the native kernels are not built")
ffi, lib = native.ffi, native.lib

KINDS = {
    "float32": lib.HPC_FLOAT32, "bfloat16": lib.HPC_BFLOAT16, "float16": lib.HPC_FLOAT16, "int8": lib.HPC_INT8,
    "int4": lib.HPC_INT4,
}  # fmt: skip
ISAS = ffi.string(lib.hpc_isas()).decode().split()
RUNTIMES = {threads: ffi.gc(lib.hpc_runtime_new(threads), lib.hpc_runtime_free) for threads in (1, 2, 3)}
GUARD = np.float32(7777)

dtypes = st.sampled_from(list(KINDS))
shapes = st.tuples(st.sampled_from([1, 2, 8]), st.integers(1, 70), st.integers(1, 70))  # grains, outputs, inputs
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def _best_instructions():
    yield
    lib.hpc_use(ISAS[0].encode())


class Stored(NamedTuple):
    """A weight as a store has it: values [G, O, I] (int4: [G, O, I / 2], I padded to GROUP)."""

    values: np.ndarray
    dtype: str
    scales: np.ndarray | None = None

    @property
    def num_out(self):
        return self.values.shape[1]


def random_weight(rng, shape, dtype):
    grains, num_out, num_in = shape
    if dtype == "int8":
        scales = rng.uniform(0.5, 2, (grains, num_out)).astype(np.float32)
        return Stored(rng.integers(-127, 128, shape, dtype=np.int8), dtype, scales)
    if dtype == "int4":
        padded = -(-num_in // GROUP) * GROUP
        codes = np.zeros((grains, num_out, padded), np.int8)
        codes[..., :num_in] = rng.integers(-8, 8, shape)
        scales = round_to(rng.uniform(0.5, 2, (grains, num_out, padded // GROUP)).astype(np.float32), "bfloat16")
        return Stored(pack_int4(codes), dtype, scales)
    return Stored(round_to(rng.standard_normal(shape).astype(np.float32), dtype), dtype)


def random_rows(rng, num_rows, shape):
    return rng.standard_normal((num_rows, shape[0], shape[2])).astype(np.float32)


def pointer(array, kind="float"):
    return ffi.NULL if array is None else ffi.from_buffer(f"{kind}[]", array)


def pack(stored, num_in, threads=2, grains=None):
    """Some grains of a weight, the outputs of each brought in two parts."""
    first, last = grains or (0, len(stored.values))
    kind = KINDS[stored.dtype] if stored.dtype in ("int8", "int4") else lib.HPC_FLOAT32
    weight = ffi.gc(lib.hpc_weight_new(kind, last - first, stored.num_out, num_in), lib.hpc_weight_free)
    for grain in range(first, last):
        for part in (slice(0, stored.num_out // 3), slice(stored.num_out // 3, stored.num_out)):
            values = np.ascontiguousarray(stored.values[grain, part])
            scales = None if stored.scales is None else np.ascontiguousarray(stored.scales[grain, part])
            lib.hpc_weight_fill(
                weight, threads, grain - first, part.start, len(values), KINDS[stored.dtype], pointer(values, "char"),
                pointer(scales, "char"),
            )  # fmt: skip
    return weight


def misplaced(array, places):
    """A copy that begins some floats after an aligned address, between guards."""
    memory = np.full(array.size + 64, GUARD, np.float32)
    part = memory[16 + places : 16 + places + array.size].reshape(array.shape)
    part[...] = array
    return memory, part


def product(weight, rows, spans=None, bias=None, threads=1, places=0):
    """Nodes [spans, T, O] of rows [T, G, I]; what lies around them must stay."""
    spans = spans or [(0, weight.grains)]
    bounds = ffi.new("int64_t[]", [bound for span in spans for bound in span])
    memory, nodes = misplaced(np.full((len(spans), len(rows), weight.num_out), np.nan, np.float32), places)
    _, values = misplaced(rows, places)
    lib.hpc_product(RUNTIMES[threads], weight, pointer(values), len(rows), bounds, len(spans), pointer(bias),
                    pointer(nodes))  # fmt: skip
    assert (memory == GUARD).sum() == 64 + (nodes == GUARD).sum()
    return nodes.copy()


def codes_of(rows):
    """Rows [T, G, I] as codes [T, G, I] and scales [T, G], by the kernels."""
    num_rows, grains, num_in = rows.shape
    padded = -(-num_in // GROUP) * GROUP
    codes, scales = np.zeros((num_rows, grains, padded), np.int8), np.zeros((num_rows, grains), np.float32)
    sums = np.zeros((num_rows, grains, padded // GROUP + 1), np.int32)
    struct = ffi.new("hpc_rows *", {"num_rows": num_rows, "grains": grains, "num_in": num_in, "padded_in": padded})
    struct.codes, struct.scales, struct.sums = pointer(codes, "int8_t"), pointer(scales), pointer(sums, "int32_t")
    lib.hpc_quantise(RUNTIMES[1], pointer(rows), struct)
    return codes[..., :num_in], scales


def tree(parts):
    half = len(parts) // 2
    return parts[0] if half == 0 else tree(parts[:half]) + tree(parts[half:])


def expected_float(stored, rows):
    """The product in float64, and the sum of its absolute terms. Quantised rows are taken as they are quantised."""
    weight = dequantise(stored.values, stored.dtype, stored.scales).astype(np.float64)[..., : rows.shape[2]]
    x = rows.astype(np.float64)
    if stored.dtype == "int4":
        codes, scales = codes_of(rows)
        x = codes * scales[..., None].astype(np.float64)
    return np.einsum("tgi,goi->to", x, weight), np.einsum("tgi,goi->to", abs(x), abs(weight))


def expected_int8(stored, rows):
    """The definition: exact integers, the output's scale, then the row's, then the tree over grains."""
    codes, scales = codes_of(rows)
    sums = np.einsum("tgi,goi->gto", codes.astype(np.int64), stored.values.astype(np.int64)).astype(np.float32)
    return tree(list(sums * stored.scales[:, None, :] * scales.T[:, :, None]))


@settings(max_examples=60, deadline=None)
@given(seed=seeds, shape=shapes, dtype=st.sampled_from(["float32", "bfloat16", "float16", "int4"]),
       num_rows=st.integers(1, 30))  # fmt: skip
def test_products_are_near_float64(seed, shape, dtype, num_rows):
    rng = np.random.default_rng(seed)
    stored, rows = random_weight(rng, shape, dtype), random_rows(rng, num_rows, shape)
    wanted, size = expected_float(stored, rows)
    [found] = product(pack(stored, shape[2]), rows)
    assert (abs(found - wanted) <= 1e-6 * size + 1e-30).all()


@settings(max_examples=60, deadline=None)
@given(seed=seeds, shape=shapes, num_rows=st.integers(0, 30))
def test_int8_products_are_exact_integers_times_scales(seed, shape, num_rows):
    rng = np.random.default_rng(seed)
    stored, rows = random_weight(rng, shape, "int8"), random_rows(rng, num_rows, shape)
    [found] = product(pack(stored, shape[2]), rows)
    np.testing.assert_array_equal(found, expected_int8(stored, rows))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_largest_codes_do_not_saturate(dtype):
    num_in, largest = 512, 127 if dtype == "int8" else 7
    codes = np.full((1, 40, num_in), largest, np.int8)
    codes[:, ::2] = -largest
    scales = {"int8": np.ones((1, 40), np.float32), "int4": np.full((1, 40, num_in // GROUP), 0x3F80, np.uint16)}
    stored = Stored(codes if dtype == "int8" else pack_int4(codes), dtype, scales[dtype])
    rows = np.full((3, 1, num_in), 127, np.float32)
    rows[1] = -127
    for isa in ISAS:
        lib.hpc_use(isa.encode())
        [found] = product(pack(stored, num_in), rows)
        np.testing.assert_array_equal(found, rows[:, 0, :1] * num_in * codes[0, :, 0])


def test_inputs_are_added_in_order():
    terms = np.array([2.0**24, 1, -(2.0**24), 1] * 3, np.float32)
    weight = pack(Stored(np.tile(terms, (1, 33, 1)), "float32"), 12)
    for isa in ISAS:
        lib.hpc_use(isa.encode())
        np.testing.assert_array_equal(product(weight, np.ones((14, 1, 12), np.float32)), 1)


def test_a_product_is_rounded_once_with_its_sum():
    x = np.float32(1 + 2.0**-12)
    stored = Stored(np.array([[[x * x, x]]], np.float32) * np.array([-1, 1], np.float32), "float32")
    rows = np.array([[[1, x]]], np.float32)
    for isa in ISAS:
        lib.hpc_use(isa.encode())
        assert product(pack(stored, 2), rows)[0, 0, 0] == 2.0**-24


@settings(max_examples=40, deadline=None)
@given(seed=seeds, shape=shapes, dtype=dtypes, num_rows=st.integers(0, 40))
def test_bits_do_not_depend_on_threads_vectors_or_alignment(seed, shape, dtype, num_rows):
    rng = np.random.default_rng(seed)
    stored, rows = random_weight(rng, shape, dtype), random_rows(rng, num_rows, shape)
    packed = {threads: pack(stored, shape[2], threads) for threads in RUNTIMES}
    whole = product(packed[1], rows).tobytes()
    for isa in ISAS:
        assert lib.hpc_use(isa.encode())
        for threads, places in ((1, 3), (2, 0), (3, 1)):
            assert product(packed[threads], rows, threads=threads, places=places).tobytes() == whole, (isa, threads)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, shape=shapes, dtype=dtypes)
def test_a_row_has_the_same_bits_in_any_batch(seed, shape, dtype):
    rng = np.random.default_rng(seed)
    weight, rows = pack(random_weight(rng, shape, dtype), shape[2]), random_rows(rng, 100, shape)
    shuffled = rng.permutation(len(rows))
    for isa in ISAS:
        lib.hpc_use(isa.encode())
        [whole] = product(weight, rows)
        assert (product(weight, rows[shuffled])[0] == whole[shuffled]).all()
        for start, stop in ((0, 1), (7, 9), (3, 20), (50, 63), (17, 84), (99, 100), (5, 5)):
            assert (product(weight, rows[start:stop])[0] == whole[start:stop]).all(), (isa, start, stop)


def test_many_rows_are_the_same_rows():
    """More rows than stay in a cache at once."""
    rng = np.random.default_rng(0)
    shape = (2, 37, 300)
    for dtype in KINDS:
        weight, rows = pack(random_weight(rng, shape, dtype), shape[2]), random_rows(rng, 700, shape)
        [whole] = product(weight, rows, threads=2)
        for start in range(0, 700, 100):
            assert (product(weight, rows[start : start + 100])[0] == whole[start : start + 100]).all(), dtype


@pytest.mark.parametrize("isa", ISAS)
def test_many_rows_of_gated_products_are_the_same_rows(isa):
    """More rows than stay in a cache at once, and more panels than threads: who is done takes those of others."""
    lib.hpc_use(isa.encode())
    rng = np.random.default_rng(1)
    for dtype in KINDS:
        gate, up = (random_weight(rng, (1, 6 * lib.HPC_PANEL + 3, 300), dtype) for _ in range(2))
        weight, rows = pack_gated(gate, up, 300), random_rows(rng, 1300, (1, gate.num_out, 300))
        parts = [gated(weight, rows[start : start + 100], gate.num_out) for start in range(0, 1300, 100)]
        for threads in RUNTIMES:
            found = gated(weight, rows, gate.num_out, threads=threads)
            assert (found == np.concatenate(parts)).all(), (dtype, threads)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, dtype=dtypes, num_rows=st.integers(1, 40),
       true_inputs=st.lists(st.integers(0, 70), min_size=2, max_size=4))  # fmt: skip
def test_padded_inputs_that_are_left_out_change_no_bit(seed, dtype, num_rows, true_inputs):
    rng = np.random.default_rng(seed)
    shape = (len(true_inputs), 40, max(max(true_inputs), 1))
    weight, rows = pack(random_weight(rng, shape, dtype), shape[2]), random_rows(rng, num_rows, shape)
    for grain, count in enumerate(true_inputs):
        rows[:, grain, count:] = 0
    counts = np.array(true_inputs)
    for isa in ISAS:
        lib.hpc_use(isa.encode())
        weight.true_inputs = ffi.NULL
        whole = product(weight, rows)
        weight.true_inputs = pointer(counts, "int64_t")
        np.testing.assert_array_equal(product(weight, rows), whole)
        if weight.kind == lib.HPC_FLOAT32:
            garbage = np.where(np.arange(shape[2]) < counts[:, None], rows, GUARD)
            np.testing.assert_array_equal(product(weight, garbage), whole)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, dtype=dtypes, num_rows=st.integers(1, 40), is_listed=st.lists(st.booleans(), min_size=5, max_size=5))
def test_panels_that_are_not_listed_are_left_out_and_no_others(seed, dtype, num_rows, is_listed):
    rng = np.random.default_rng(seed)
    shape = (1, 4 * lib.HPC_PANEL + 7, 70)
    weight, rows = pack(random_weight(rng, shape, dtype), shape[2]), random_rows(rng, num_rows, shape)
    [whole] = product(weight, rows)
    listed = np.flatnonzero(is_listed)
    weight.listed_panels, weight.num_listed = pointer(listed, "int64_t"), len(listed)
    columns = np.repeat(is_listed, lib.HPC_PANEL)[: shape[1]]
    for threads in RUNTIMES:
        [found] = product(weight, rows, threads=threads)
        np.testing.assert_array_equal(found[:, columns], whole[:, columns])
        assert np.isnan(found[:, ~columns]).all()


@settings(max_examples=25, deadline=None)
@given(seed=seeds, tp=st.integers(1, 8), dtype=dtypes, num_rows=st.integers(0, 20), num_out=st.integers(1, 40),
       num_in=st.integers(1, 40))  # fmt: skip
def test_partial_sums_have_the_same_bits_for_every_tp(seed, tp, dtype, num_rows, num_out, num_in):
    rng = np.random.default_rng(seed)
    shape = (8, num_out, num_in)
    stored, rows = random_weight(rng, shape, dtype), random_rows(rng, num_rows, shape)
    [expected] = product(pack(stored, num_in), rows)
    nodes = {}
    for run in grain_runs(8, tp):
        spans = subtrees(run)
        part = rows[:, run.start : run.stop]
        local = [(span.start - run.start, span.stop - run.start) for span in spans]
        nodes.update(zip(spans, product(pack(stored, num_in, grains=(run.start, run.stop)), part, local), strict=True))
    assert (tree_reduce(nodes, Span(0, 8), np.add) == expected).all()


@pytest.mark.parametrize("dtype", KINDS)
def test_the_bias_is_added_last(dtype):
    rng = np.random.default_rng(0)
    shape = (1, 45, 33)
    weight, rows = pack(random_weight(rng, shape, dtype), shape[2]), random_rows(rng, 15, shape)
    bias = rng.standard_normal(45).astype(np.float32)
    assert (product(weight, rows, bias=bias) == product(weight, rows) + bias).all()


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 3e38])
def test_a_broken_row_breaks_no_other(dtype, number):
    rng = np.random.default_rng(0)
    shape = (2, 45, 70)
    weight, rows = pack(random_weight(rng, shape, dtype), shape[2]), random_rows(rng, 15, shape)
    [whole] = product(weight, rows)
    rows[4] = number
    others = np.arange(15) != 4
    assert (product(weight, rows)[0, others] == whole[others]).all()


def test_every_half_precision_number_is_widened_exactly():
    every = np.arange(2**16, dtype=np.uint16).reshape(1, -1, 1)
    for stored in (Stored(every.view(np.float16), "float16"), Stored(every, "bfloat16")):
        wanted = to_float32(stored.values[0, :, 0], stored.dtype)
        is_finite = np.isfinite(wanted)
        found = product(pack(stored, 1), np.ones((1, 1, 1), np.float32))[0, 0]
        np.testing.assert_array_equal(found[is_finite], wanted[is_finite])
        np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
        np.testing.assert_array_equal(np.isinf(found), np.isinf(wanted))


def test_large_weights_begin_at_a_huge_page():
    weight = ffi.gc(lib.hpc_weight_new(lib.HPC_FLOAT32, 1, 2048, 512), lib.hpc_weight_free)
    assert int(ffi.cast("uintptr_t", weight.panels)) % 2**21 == 0
    assert not any(memoryview(ffi.buffer(weight.panels, weight.total_bytes))[:: 2**12])


def test_more_memory_than_there_is_gives_no_weight():
    assert lib.hpc_weight_new(lib.HPC_FLOAT32, 1, 2**24, 2**24) == ffi.NULL


def pack_gated(gate, up, num_in):
    """Gates and what they multiply, one grain each."""
    kind = KINDS[gate.dtype] if gate.dtype in ("int8", "int4") else lib.HPC_FLOAT32
    weight = ffi.gc(lib.hpc_gated_weight_new(kind, gate.num_out, num_in), lib.hpc_weight_free)
    for stored, first_out in ((gate, 0), (up, weight.num_out // 2)):
        lib.hpc_weight_fill(weight, 2, 0, first_out, stored.num_out, KINDS[stored.dtype],
                            pointer(stored.values, "char"), pointer(stored.scales, "char"))  # fmt: skip
    return weight


def gated(weight, rows, num_gates, bias=None, threads=1, places=0):
    """silu(gate) * up [T, num_gates] of rows [T, 1, I]; what lies around it must stay."""
    memory, out = misplaced(np.full((len(rows), num_gates), np.nan, np.float32), places)
    _, values = misplaced(rows, places)
    lib.hpc_gated_product(RUNTIMES[threads], weight, pointer(values), len(rows), num_gates, pointer(bias), pointer(out))
    assert (memory == GUARD).sum() == 64 + (out == GUARD).sum()
    return out.copy()


def silu_mul(pairs):
    """silu(gate) * up of pairs [T, 2, size], by a product with ones."""
    size = pairs.shape[2]
    ones = np.eye(2 * size, dtype=np.float32)
    gate, up = (Stored(np.ascontiguousarray(half[None]), "float32") for half in (ones[:size], ones[size:]))
    return gated(pack_gated(gate, up, 2 * size), pairs.reshape(len(pairs), 1, 2 * size), size)


@given(seed=seeds, num_rows=st.integers(0, 20), size=st.integers(1, 130))
@settings(deadline=None, max_examples=60)
def test_silu_of_any_length(seed, num_rows, size):
    pairs = np.random.default_rng(seed).uniform(-100, 100, (num_rows, 2, size)).astype(np.float32)
    gate, up = pairs.astype(np.float64).swapaxes(0, 1)
    np.testing.assert_allclose(silu_mul(pairs), gate / (1 + np.exp(-gate)) * up, rtol=1e-6, atol=1e-30)


def test_silu_of_large_numbers_is_finite():
    pairs = np.ones((1, 2, 5), np.float32)
    pairs[0, 0] = [-1e30, 1e30, 0, -0.0, -90]
    np.testing.assert_array_equal(silu_mul(pairs).ravel(), np.array([0, 1e30, 0, 0, 0], np.float32))


@given(seed=seeds, dtype=dtypes, num_rows=st.integers(0, 40), size=st.integers(1, 130), num_in=st.integers(1, 70),
       has_bias=st.booleans(), places=st.integers(0, 15))  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_gated_products_are_two_products_and_silu(seed, dtype, num_rows, size, num_in, has_bias, places):
    rng = np.random.default_rng(seed)
    gate, up = (random_weight(rng, (1, size, num_in), dtype) for _ in range(2))
    rows, weight = random_rows(rng, num_rows, (1, size, num_in)), pack_gated(gate, up, num_in)
    biases = [rng.standard_normal(size).astype(np.float32) for _ in range(2)] if has_bias else [None, None]
    pairs = [product(pack(stored, num_in), rows, bias=bias)[0] for stored, bias in zip((gate, up), biases, strict=True)]
    expected = silu_mul(np.stack(pairs, axis=1))
    both = np.concatenate([np.pad(bias, (0, -size % lib.HPC_PANEL)) for bias in biases]) if has_bias else None
    for isa in ISAS:
        lib.hpc_use(isa.encode())
        for threads in RUNTIMES:
            found = gated(weight, rows, size, both, threads, places)
            np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32), err_msg=f"{isa} {threads}")


def test_gated_weights_are_given_back_as_they_came():
    rng = np.random.default_rng(1)
    for dtype in KINDS:
        gate, up = (random_weight(rng, (1, 100, 40), dtype) for _ in range(2))
        weight = pack_gated(gate, up, 40)
        for stored, first in ((gate, 0), (up, weight.num_out // 2)):
            is_quantised = stored.scales is not None
            values = np.empty_like(stored.values[0]) if is_quantised else np.empty((100, 40), np.float32)
            scales = np.empty_like(stored.scales[0]) if is_quantised else None
            lib.hpc_weight_read(weight, 0, first, 100, pointer(values, "char"), pointer(scales, "char"))
            expected = stored.values[0] if is_quantised else to_float32(stored.values[0], dtype)
            np.testing.assert_array_equal(values, expected)
            if is_quantised:
                np.testing.assert_array_equal(scales, stored.scales[0])
