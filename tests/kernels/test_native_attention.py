"""Native attention and KV cache against float64, and their contract: no bit depends on how the work was arranged."""

from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_attention import EPS, THETA, naive_attention
from steps import Chunk, block_tables, packed_step, schedule

from hpcinfer.config import RopeScaling
from hpcinfer.kernels.protocol import HeadLayout
from hpcinfer.kernels.rope import rope_table

native = pytest.importorskip("hpcinfer.kernels.native._native", reason="the native kernels are not built")
ffi, lib = native.ffi, native.lib

DTYPES = {
    "float32": lib.HPC_FLOAT32, "bfloat16": lib.HPC_BFLOAT16, "float16": lib.HPC_FLOAT16, "int8": lib.HPC_INT8,
}  # fmt: skip
ISAS = ffi.string(lib.hpc_isas()).decode().split()
LIMIT = 400  # positions


class Case(NamedTuple):
    """Heads and a window; rows of q, k and v side by side, as a layer's first product leaves them."""

    grain_heads: tuple[int, ...]  # query heads of each grain; all have room for the largest of them
    kv_of_head: tuple[int, ...]
    num_kv_heads: int
    head_size: int
    window: int
    dtype: str
    rows: list[np.ndarray]  # per sequence, float32 [L, G * U + 2 * K * H]
    norms: tuple[np.ndarray | None, np.ndarray | None] = (None, None)

    @property
    def layout(self):
        return HeadLayout(self.head_size, max(self.grain_heads), self.grain_heads, self.kv_of_head)

    @property
    def grain_columns(self):
        return max(self.grain_heads) * self.head_size

    @property
    def head_columns(self):
        places = [(grain, i) for grain, count in enumerate(self.grain_heads) for i in range(count)]
        return [grain * self.grain_columns + i * self.head_size for grain, i in places]

    @property
    def num_head_columns(self):
        return len(self.grain_heads) * self.grain_columns


class Arrangement(NamedTuple):
    """What must not change a bit."""

    block_size: int = 16
    threads: int = 1
    isa: str = ISAS[0]
    garbage: int = 0xFF  # in every byte of the cache; 0xFF makes NaN


def make_case(lengths, grain_heads, num_kv_heads, head_size=16, window=0, dtype="float32", seed=0):
    num_heads = sum(grain_heads)
    kv_of_head = tuple(head * num_kv_heads // num_heads for head in range(num_heads))
    case = Case(tuple(grain_heads), kv_of_head, num_kv_heads, head_size, window, dtype, [])
    random = np.random.default_rng(seed)
    columns = case.num_head_columns + 2 * num_kv_heads * head_size
    is_padding = np.ones(columns, bool)
    for column in (*case.head_columns, *range(case.num_head_columns, columns, head_size)):
        is_padding[column : column + head_size] = False
    for length in lengths:
        rows = random.standard_normal((length, columns)).astype(np.float32)
        rows[:, is_padding] = np.nan
        case.rows.append(rows)
    return case


def pointer(array, kind="int64_t[]"):
    return ffi.NULL if array is None else ffi.from_buffer(kind, array)


USUAL = Arrangement()


def run(case, batches, arrangement=USUAL):
    """Attention of all sequences, in these batches: [L, G * U] per sequence."""
    block_size, threads, isa, garbage = arrangement
    lengths = [len(rows) for rows in case.rows]
    tables, num_blocks = block_tables(lengths, block_size, seed=len(batches))
    cache = ffi.gc(
        lib.hpc_cache_new(DTYPES[case.dtype], num_blocks, block_size, case.num_kv_heads, case.head_size),
        lib.hpc_cache_free,
    )
    ffi.memmove(cache.keys, bytes([garbage]) * cache.total_bytes, cache.total_bytes)
    runtime = ffi.gc(lib.hpc_runtime_new(threads), lib.hpc_runtime_free)
    assert lib.hpc_use(isa.encode())
    results = [np.full((length, case.num_head_columns), np.nan, np.float32) for length in lengths]
    for chunks in batches:
        step = packed_step(chunks, [np.zeros(length, np.int64) for length in lengths], tables, block_size)
        rows = np.concatenate([case.rows[c.sequence][c.start : c.stop] for c in chunks])
        heads = run_step(case, step, rows, cache, runtime)
        for chunk, part in zip(chunks, np.split(heads, step.query_starts[1:-1]), strict=True):
            results[chunk.sequence][chunk.start : chunk.stop] = part
    lib.hpc_use(ISAS[0].encode())
    return results


def run_step(case, step, rows, cache, runtime):
    head_columns, kv_of_head = np.array(case.head_columns, np.int64), np.array(case.kv_of_head, np.int64)
    rope = rope_table(LIMIT, case.head_size, THETA, RopeScaling())
    qkv = ffi.new("hpc_weight *", {"num_out": rows.shape[1]})
    layer = ffi.new("hpc_attention_layer *", {
        "qkv": qkv, "rope": pointer(rope, "float[]"), "eps": EPS, "window": case.window,
        "q_norm": pointer(case.norms[0], "float[]"), "k_norm": pointer(case.norms[1], "float[]"),
        "head_size": case.head_size, "num_heads": len(kv_of_head), "num_kv_heads": case.num_kv_heads,
        "grains": len(case.grain_heads), "grain_columns": case.grain_columns,
        "head_columns": pointer(head_columns), "kv_of_head": pointer(kv_of_head),
    })  # fmt: skip
    names = ("positions", "slots", "query_starts", "block_tables", "table_starts")
    batch = ffi.new("hpc_step *", {name: pointer(getattr(step, name)) for name in names})
    batch.num_tokens, batch.num_sequences = len(step.positions), len(step.context_lens)
    heads = np.full((len(rows), case.num_head_columns), np.nan, np.float32)
    lib.hpc_rotate_and_store(runtime, layer, batch, cache, pointer(rows, "float[]"))
    lib.hpc_attend(runtime, layer, batch, cache, pointer(rows, "float[]"), pointer(heads, "float[]"))
    return heads


def run_alone(case, sequence):
    """One sequence as the only one, in one chunk."""
    alone = case._replace(rows=[case.rows[sequence]])
    return run(alone, [[Chunk(0, 0, len(case.rows[sequence]))]])[0]


def stored(x, dtype):
    """What the cache gives back for float32 rows [..., H]."""
    if dtype == "int8":
        limit, tiny = np.float32([3.4e38, 1e-35])
        x = np.nan_to_num(x, nan=0.0, posinf=limit, neginf=-limit).clip(-limit, limit)
        largest = np.abs(x).max(-1, keepdims=True)
        inverse = np.where(largest < tiny, np.float32(0), np.float32(127) / np.maximum(largest, tiny))
        return np.rint(x * inverse) * (largest / np.float32(127))
    kind = getattr(torch, dtype)
    limit = torch.finfo(kind).max
    return torch.from_numpy(x).nan_to_num(0.0, limit, -limit).clamp(-limit, limit).to(kind).float().numpy()


def naive(case, sequence):
    """The same in float64: [L, G * U]."""
    store = partial(stored, dtype=case.dtype)
    return naive_attention(case.rows[sequence], case.layout, case.head_columns, case.norms, case.window, store)


def agrees(case, sequence, found, tolerance=3e-6):
    np.testing.assert_allclose(found, naive(case, sequence), rtol=0, atol=tolerance)


# heads of each grain, KV heads: ratios 1, 2, 3, 4, 7, 8 and uneven ones; empty grains; more rows than an item takes
HEADS = [((1,), 1), ((2, 2), 4), ((2, 2), 2), ((3, 3, 3), 3), ((4,), 1), ((8, 8), 2), ((1, 1, 0, 0), 2),
         ((2, 2, 2, 2, 2, 2, 1, 1), 2), ((3, 2), 2), ((100,), 1)]  # fmt: skip


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("window", [0, 1, 5, 64, 70])
def test_attention_agrees_with_its_definition(heads, window):
    case = make_case([1, 64, 65, 200], *heads, window=window)
    batches = [[Chunk(s, 0, len(case.rows[s])) for s in range(4)]]
    for sequence, found in enumerate(run(case, batches)):
        agrees(case, sequence, found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [2, 8, 20, 32, 64, 80, 128, 256])
def test_head_sizes_and_cache_dtypes_agree_with_the_definition(head_size, dtype):
    case = make_case([150, 3], (2, 1), 1, head_size=head_size, dtype=dtype)
    for sequence, found in enumerate(run(case, schedule([150, 3], 70, 2))):
        agrees(case, sequence, found)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=5),
    heads=st.sampled_from(HEADS),
    head_size=st.sampled_from([8, 20, 32, 64, 80, 128]),
    window=st.sampled_from([0, 1, 3, 63, 64, 65, 100]),
    dtype=st.sampled_from(list(DTYPES)),
    arrangement=st.builds(
        Arrangement,
        block_size=st.sampled_from([1, 3, 8, 16, 20, 48, 64, 100]),
        threads=st.sampled_from([1, 2, 3]),
        isa=st.sampled_from(ISAS),
        garbage=st.sampled_from([0x00, 0x7F, 0xFF]),
    ),
    chunk=st.sampled_from([1, 2, 16, 17, 64, 150]),
    company=st.integers(1, 5),
)
def test_no_bit_depends_on_how_the_work_is_arranged(
    lengths, heads, head_size, window, dtype, arrangement, chunk, company
):
    case = make_case(lengths, *heads, head_size=head_size, window=window, dtype=dtype)
    found = run(case, schedule(lengths, chunk, company), arrangement)
    for sequence, result in enumerate(found):
        assert result.tobytes() == run_alone(case, sequence).tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bit_depends_on_the_instruction_set(isa, dtype):
    case = make_case([200, 1, 17], (3, 2), 2, head_size=80, window=90, dtype=dtype)
    case = case._replace(norms=(np.linspace(-1, 2, 80, dtype=np.float32), np.linspace(2, 1, 80, dtype=np.float32)))
    found = run(case, schedule([200, 1, 17], 100, 3), Arrangement(isa=isa, threads=2))
    for sequence, result in enumerate(found):
        assert result.tobytes() == run_alone(case, sequence).tobytes()


def test_q_and_k_are_normed_before_they_are_rotated():
    case = make_case([40], (2, 2), 2, head_size=24)
    case = case._replace(norms=(np.linspace(-1, 2, 24, dtype=np.float32), np.linspace(2, 1, 24, dtype=np.float32)))
    agrees(case, 0, run_alone(case, 0))


def test_heads_have_the_same_bits_whichever_rank_holds_them():
    case = make_case([100], (2, 2, 2, 1), 1)
    whole = run_alone(case, 0)
    for start, grains in ((0, (2, 2)), (64, (2, 1)), (96, (1, 0))):
        columns = [*range(start, start + 16 * max(grains) * len(grains)), *range(128, 160)]
        rows = np.take(case.rows[0], columns, 1)
        part = case._replace(grain_heads=grains, kv_of_head=(0,) * sum(grains), rows=[rows])
        width = 16 * sum(grains)
        assert run_alone(part, 0)[:, :width].tobytes() == whole[:, start : start + width].tobytes()


@pytest.mark.parametrize("num_kv_heads", [0, 2])
def test_no_query_heads_give_zeros(num_kv_heads):
    rows = np.ones((5, 32 + 32 * num_kv_heads), np.float32)
    case = Case((1, 1), (), num_kv_heads, 16, 0, "float32", [rows])

    class Empty(Case):
        head_columns = ()

    assert not run_alone(Empty(*case), 0).any()


SPECIAL = np.array([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1e30, -1e30, 3.4e38, 65504, 65519.9, 65520, 1e-30,
                    1e-40, -1e-45, 6e-8, 2.98e-8, 2.99e-8, 6.1e-5, -6.097e-5, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8],
                   np.float32)  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_rounded_to_nearest_even_and_stay_finite(dtype, isa):
    case = make_case([1] * 260, (2,), 1, head_size=64, dtype=dtype)
    random = np.random.default_rng(3)
    for number, rows in enumerate(case.rows):
        rows[:, -64:] *= 2.0 ** random.integers(-30, 20, 64)
        if number % 5 == 0:
            rows[0, -64 : len(SPECIAL) - 64] = SPECIAL if number % 2 else random.permutation(SPECIAL) * 1e-30
    found = run(case, [[Chunk(s, 0, 1) for s in range(260)]], Arrangement(isa=isa))
    for rows, result in zip(case.rows, found, strict=True):  # the only key has the weight 1, exactly
        assert np.isfinite(result).all()
        np.testing.assert_array_equal(result[:, 64:], stored(rows[:, -64:], dtype))


@pytest.mark.parametrize("value", [1e30, -1e30, np.inf, np.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_cannot_spoil_those_before_it(value, dtype):
    case = make_case([40], (1,), 1, dtype=dtype)
    before = run_alone(case, 0)[:30]
    case.rows[0][30:] = value
    assert run_alone(case, 0)[:30].tobytes() == before.tobytes()


def test_the_sign_of_a_zero_does_not_tell_of_unseen_keys():
    case = make_case([3], (8,), 8)
    values = case.rows[0][:, -8 * 16 :]
    values[0], values[1], values[2] = -1e-45, -0.0, 1.0  # at the second token -1e-45 vanishes where its weight is small
    one_by_one = run(case, [[Chunk(0, i, i + 1)] for i in range(3)])[0]
    assert one_by_one.tobytes() == run_alone(case, 0).tobytes()


def test_a_cache_that_does_not_fit_is_refused():
    assert lib.hpc_cache_new(lib.HPC_FLOAT32, 1 << 40, 16, 8, 128) == ffi.NULL
