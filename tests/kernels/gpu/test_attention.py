"""Attention and KV cache against float64, and their contract: no bit depends on how the work was arranged."""

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
from hpcinfer.dtypes import round_to, to_float32
from hpcinfer.kernels.gpu.graphs import padded
from hpcinfer.kernels.protocol import HeadLayout
from hpcinfer.kernels.rope import rope_table

# what the interpreter's numpy says of rows that are broken on purpose
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

LIMIT = 600  # positions
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# of the type that q is rounded to; Triton's interpreter cuts bfloat16 off instead of rounding it
TOLERANCE = {"float32": 3e-6, "bfloat16": 4e-2, "float16": 3e-3}


class Case(NamedTuple):
    """Heads and a window; rows of q, k and v side by side, as a layer's first product leaves them."""

    layout: HeadLayout
    num_kv_heads: int
    window: int
    dtype: str  # of q
    cache_dtype: str
    rows: list[np.ndarray]  # per sequence, float32 [L, G * U + 2 * K * H], NaN where no head is
    norms: tuple[np.ndarray | None, np.ndarray | None] = (None, None)

    @property
    def head_columns(self):
        size, room = self.layout.head_size, self.layout.heads_per_grain
        return [(grain * room + i) * size for grain, count in enumerate(self.layout.grain_heads) for i in range(count)]

    @property
    def num_columns(self):
        return len(self.layout.grain_heads) * self.layout.heads_per_grain * self.layout.head_size


def make_case(lengths, grain_heads, num_kv_heads, head_size=16, window=0, dtype="float32", cache_dtype="", seed=0):
    num_heads = sum(grain_heads)
    kv_of_head = tuple(head * num_kv_heads // num_heads for head in range(num_heads))
    layout = HeadLayout(head_size, max(grain_heads), tuple(grain_heads), kv_of_head)
    case = Case(layout, num_kv_heads, window, dtype, cache_dtype or dtype, [])
    random, columns = np.random.default_rng(seed), case.num_columns + 2 * num_kv_heads * head_size
    is_padding = np.ones(columns, bool)
    for column in (*case.head_columns, *range(case.num_columns, columns, head_size)):
        is_padding[column : column + head_size] = False
    for length in lengths:
        rows = random.standard_normal((length, columns)).astype(np.float32)
        rows[:, is_padding] = np.nan
        case.rows.append(rows)
    return case


class Kit(NamedTuple):
    """The device, kernels that allocate, and the modules that are tested."""

    device: torch.device
    kernels: object
    attention: object
    rows: object
    plan: object
    step: object


@pytest.fixture(scope="module")
def kit(device, make):
    from hpcinfer.kernels.gpu import attention, plan, rows, step

    return Kit(device, make(), attention, rows, plan, step)


def run(kit, case, batches, block_size=16, garbage=0xFF):
    """Attention of all sequences, in these batches: [L, G * U] per sequence."""
    lengths = [len(rows) for rows in case.rows]
    tables, num_blocks = block_tables(lengths, block_size, seed=len(batches))
    cache = kit.kernels.kv_cache(num_blocks, block_size, case.num_kv_heads, case.layout.head_size, case.cache_dtype)
    for part in cache[:4]:
        if part is not None:
            part.view(torch.uint8).fill_(garbage)
    results = [np.full((length, case.num_columns), np.nan, np.float32) for length in lengths]
    for chunks in batches:
        step = packed_step(chunks, [np.zeros(length, np.int64) for length in lengths], tables, block_size)
        rows = np.concatenate([case.rows[c.sequence][c.start : c.stop] for c in chunks])
        heads = np.split(run_step(kit, case, step, rows, cache), step.query_starts[1:-1])
        for chunk, part in zip(chunks, heads, strict=True):
            results[chunk.sequence][chunk.start : chunk.stop] = part
    return results


def run_step(kit, case, step, rows, cache):
    dtype, groups = TYPES[case.dtype], kit.plan.group_heads(case.layout, kit.device)
    there = kit.step.DeviceStep(step, kit.device)
    rope = torch.from_numpy(rope_table(LIMIT, case.layout.head_size, THETA, RopeScaling()).copy()).to(kit.device)
    norms = [None if norm is None else torch.from_numpy(norm).to(kit.device) for norm in case.norms]
    rotation = kit.rows.Rotation(rope, *norms, EPS, groups.head_columns, groups.num_columns)
    qkv = torch.from_numpy(rows).to(kit.device)
    q = kit.rows.rotate_and_store(qkv, there.places.positions, there.places.slots, rotation, cache, dtype)
    key = kit.plan.PlanKey(groups.size, case.window, kit.attention.rows_of_program(dtype, cache))
    found = kit.attention.attend(q, there.places, cache, groups, there.plan(key), case.window, torch.float32)
    return found.cpu().numpy()


def run_alone(kit, case, sequence):
    """One sequence as the only one, in one chunk."""
    alone = case._replace(rows=[case.rows[sequence]])
    return run(kit, alone, [[Chunk(0, 0, len(case.rows[sequence]))]])[0]


def stored(x, dtype):
    """What the cache gives back for float32 rows [..., H]."""
    if dtype == "int8":
        limit, tiny = np.float32([3.4028235e38, 1e-35])
        x = np.nan_to_num(x, nan=0.0, posinf=limit, neginf=-limit)
        largest = np.abs(x).max(-1, keepdims=True)
        inverse = np.where(largest < tiny, np.float32(0), np.float32(127) / np.maximum(largest, tiny))
        return np.rint(x * inverse) * (largest / np.float32(127))
    if dtype == "fp8":
        limit, tiny = np.float32([3.4028235e38, 1e-35])
        x = np.nan_to_num(x, nan=0.0, posinf=limit, neginf=-limit)
        largest = np.abs(x).max(-1, keepdims=True)
        inverse = np.where(largest < tiny, np.float32(0), np.float32(448) / np.maximum(largest, tiny))
        codes = to_float32(round_to(x * inverse, "float8_e4m3"), "float8_e4m3")
        return codes * np.where(largest < tiny, np.float32(0), largest / np.float32(448))
    kind = TYPES[dtype]
    limit = torch.finfo(kind).max
    return torch.from_numpy(x).nan_to_num(0.0, limit, -limit).clamp(-limit, limit).to(kind).float().numpy()


def naive(case, sequence):
    """The same in float64: [L, G * U]."""
    store = partial(stored, dtype=case.cache_dtype)
    return naive_attention(case.rows[sequence], case.layout, case.head_columns, case.norms, case.window, store)


def agrees(case, sequence, found):
    np.testing.assert_allclose(found, naive(case, sequence), rtol=0, atol=TOLERANCE[case.dtype])


# heads of each grain, KV heads: ratios 1, 2, 3, 4, 8 and uneven ones; empty grains; more rows than a program takes
HEADS = [((1,), 1), ((2, 2), 4), ((2, 2), 2), ((3, 3, 3), 3), ((4,), 1), ((8, 8), 2), ((1, 1, 0, 0), 2),
         ((2, 2, 2, 2, 2, 2, 1, 1), 2), ((3, 2), 2), ((20,), 1)]  # fmt: skip


@pytest.mark.parametrize("heads, window", [(heads, (0, 40)[i % 2]) for i, heads in enumerate(HEADS)], ids=str)
def test_attention_agrees_with_its_definition(kit, heads, window):
    case = make_case([1, 66], *heads, window=window)
    for sequence, found in enumerate(run(kit, case, [[Chunk(s, 0, len(case.rows[s])) for s in range(2)]])):
        agrees(case, sequence, found)


@pytest.mark.parametrize("head_size, dtype, cache_dtype", [
    (2, "float32", "float32"), (20, "float16", "float16"), (64, "bfloat16", "bfloat16"), (80, "float16", "int8"),
    (80, "float16", "fp8"), (32, "float32", "fp8"), (64, "bfloat16", "fp8"),
    (32, "float32", "int8"), (128, "float32", "bfloat16"), (24, "bfloat16", "float16"), (256, "float16", "float16"),
])  # fmt: skip
def test_head_sizes_and_types_agree_with_the_definition(kit, head_size, dtype, cache_dtype):
    case = make_case([100, 3], (2, 1), 1, head_size=head_size, dtype=dtype, cache_dtype=cache_dtype)
    for sequence, found in enumerate(run(kit, case, schedule([100, 3], 70, 2))):
        tolerance = max(TOLERANCE[dtype], TOLERANCE.get(cache_dtype, 0))
        np.testing.assert_allclose(found, naive(case, sequence), rtol=0, atol=tolerance)


@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    heads=st.sampled_from(HEADS[:-1]),
    head_size=st.sampled_from([8, 20, 32]),
    window=st.sampled_from([0, 1, 3, 63, 64, 65]),
    types=st.sampled_from([("float32", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16"),
                           ("float16", "int8"), ("float16", "fp8"), ("float32", "bfloat16")]),
    block_size=st.sampled_from([1, 3, 16, 20, 64, 100]),
    garbage=st.sampled_from([0x00, 0x7F, 0xFF]),
    chunk=st.sampled_from([1, 17, 64, 90]),
    company=st.integers(1, 4),
)  # fmt: skip
def test_no_bit_depends_on_how_the_work_is_arranged(
    kit, lengths, heads, head_size, window, types, block_size, garbage, chunk, company
):
    lengths = lengths if chunk > 1 else [min(length, 12) for length in lengths]
    case = make_case(lengths, *heads, head_size, window, *types)
    found = run(kit, case, schedule(lengths, chunk, company), block_size, garbage)
    for sequence, result in enumerate(found):
        assert result.tobytes() == run_alone(kit, case, sequence).tobytes()


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_no_bit_depends_on_who_walks_the_splits(kit, monkeypatch, dtype, window):
    case = make_case([200], (2, 1), 1, window=window, dtype=dtype)
    usual = run_alone(kit, case, 0)
    for module in (kit.plan, kit.attention):
        monkeypatch.setattr(module, "SPLIT", 1)
    agrees(case, 0, whole := run_alone(kit, case, 0))
    np.testing.assert_allclose(usual, whole, rtol=0, atol=TOLERANCE[dtype])
    chunks = [Chunk(0, 0, 150), Chunk(0, 150, 155), *(Chunk(0, i, i + 1) for i in (155, 156)), Chunk(0, 157, 200)]
    assert run(kit, case, [[chunk] for chunk in chunks])[0].tobytes() == whole.tobytes()


def test_a_token_that_is_there_several_times_has_the_same_row_each_time(kit, monkeypatch):
    for module in (kit.plan, kit.attention):
        monkeypatch.setattr(module, "SPLIT", 1)
    case = make_case([130], (20,), 1, dtype="float16")  # four tokens fill a program
    tables, num_blocks = block_tables([130], 16)
    cache = kit.kernels.kv_cache(num_blocks, 16, 1, 16, "float16")
    steps = [packed_step([Chunk(0, *chunk)], [np.zeros(130, np.int64)], tables, 16) for chunk in ((0, 129), (129, 130))]
    run_step(kit, case, steps[0], case.rows[0][:129], cache)
    kept = [part.view(torch.int16) for part in cache[:2]]
    before = [part.clone() for part in kept]
    [row, *others] = run_step(kit, case, padded(steps[1], 10), np.repeat(case.rows[0][129:], 10, axis=0), cache)
    assert row.tobytes() == run_alone(kit, case, 0)[129].tobytes()
    assert all(other.tobytes() == row.tobytes() for other in others) and len(others) == 9
    assert all(int((part != old).any((1, 2)).sum()) == 1 for part, old in zip(kept, before, strict=True))


def test_q_and_k_are_normed_before_they_are_rotated(kit):
    case = make_case([40], (2, 2), 2, head_size=24)
    agrees(case := case._replace(norms=(np.linspace(-1, 2, 24, dtype=np.float32),) * 2), 0, run_alone(kit, case, 0))


def test_heads_have_the_same_bits_whichever_rank_holds_them(kit):
    case = make_case([100], (2, 2, 2, 1), 1, dtype="float16")
    whole = run_alone(kit, case, 0)
    for start, grains in ((0, (2, 2)), (64, (2, 1)), (96, (1, 0))):
        columns = [*range(start, start + 16 * max(grains) * len(grains)), *range(128, 160)]
        layout = HeadLayout(16, max(grains), grains, (0,) * sum(grains))
        part = case._replace(layout=layout, rows=[np.take(case.rows[0], columns, 1)])
        width = 16 * sum(grains)
        assert run_alone(kit, part, 0)[:, :width].tobytes() == whole[:, start : start + width].tobytes()


@pytest.mark.parametrize("num_kv_heads", [0, 2])
def test_no_query_heads_give_zeros(kit, num_kv_heads):
    rows = np.ones((5, 32 + 32 * num_kv_heads), np.float32)
    case = Case(HeadLayout(16, 1, (0, 0), ()), num_kv_heads, 0, "float32", "float32", [rows])
    assert not run_alone(kit, case, 0).any()


@pytest.mark.parametrize("value", [1e30, -1e30, np.inf, np.nan])
@pytest.mark.parametrize("cache_dtype", ["float32", "float16", "int8", "fp8"])
def test_a_token_cannot_spoil_those_before_it(kit, value, cache_dtype):
    case = make_case([40], (1,), 1, cache_dtype=cache_dtype)
    before = run_alone(kit, case, 0)[:30]
    case.rows[0][30:] = value
    assert run_alone(kit, case, 0)[:30].tobytes() == before.tobytes()


SPECIAL = np.array([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1e30, -1e30, 3.4e38, 65504, 65520, 1e-30, 6e-8,
                    6.1e-5, 1 + 2**-11, 1 + 3 * 2**-11], np.float32)  # fmt: skip


@pytest.mark.parametrize("cache_dtype", ["float32", "float16", "int8", "fp8"])
def test_values_are_rounded_to_nearest_even_and_stay_finite(kit, cache_dtype):
    case = make_case([1] * 3, (1,), 1, cache_dtype=cache_dtype)
    for number, rows in enumerate(case.rows):
        rows[:, -16:] = np.roll(SPECIAL, number) if number < 2 else rows[:, -16:]
    found = run(kit, case, [[Chunk(s, 0, 1) for s in range(3)]])
    for rows, result in zip(case.rows, found, strict=True):  # the only key has the weight 1, exactly
        np.testing.assert_array_equal(result, stored(rows[:, -16:], cache_dtype))


def test_the_sign_of_a_zero_does_not_tell_of_unseen_keys(kit):
    case = make_case([3], (8,), 8)
    values = case.rows[0][:, -8 * 16 :]
    values[0], values[1], values[2] = -1e-45, -0.0, 1.0  # at the second token -1e-45 vanishes where its weight is small
    one_by_one = run(kit, case, [[Chunk(0, i, i + 1)] for i in range(3)])[0]
    assert one_by_one.tobytes() == run_alone(kit, case, 0).tobytes()
