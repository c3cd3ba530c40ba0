"""Attention against float64, and its contract: no bit depends on chunks, company, block size or garbage."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import Chunk, block_tables, packed_step, schedule

from hpcinfer.config import RopeScaling
from hpcinfer.kernels import create_kernels, reference_attention
from hpcinfer.kernels.protocol import HeadLayout

SCALING = RopeScaling()
LIMIT = 400  # positions


class Case(NamedTuple):
    """Heads and a window; q, k and v of some sequences."""

    layout: HeadLayout
    num_kv_heads: int
    window: int
    dtype: str
    qkv: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # per sequence, each [L, heads, H]


def make_case(lengths, grain_heads, num_kv_heads, head_size=16, window=0, dtype="float32", seed=0):
    num_heads = sum(grain_heads)
    kv_of_head = tuple(head * num_kv_heads // num_heads for head in range(num_heads))
    random = torch.Generator().manual_seed(seed)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    qkv = [tuple(torch.randn(length, n, head_size, generator=random) for n in heads) for length in lengths]
    layout = HeadLayout(head_size, max(grain_heads), tuple(grain_heads), kv_of_head)
    return Case(layout, num_kv_heads, window, dtype, qkv)


def run(case, batches, block_size, kernels=None, garbage=torch.nan):
    """Attention of all sequences, in these batches: [L, G, U] per sequence."""
    kernels = kernels or create_kernels("reference")
    lengths = [len(q) for q, _, _ in case.qkv]
    tables, num_blocks = block_tables(lengths, block_size, seed=len(batches))
    cache = kernels.kv_cache(num_blocks, block_size, case.num_kv_heads, case.layout.head_size, case.dtype)
    cache.values[:, :num_blocks] = garbage
    rope = kernels.rope_table(LIMIT, case.layout.head_size, 100.0, SCALING)
    token_ids = [np.zeros(length, np.int64) for length in lengths]
    results = [torch.zeros(0)] * len(lengths)
    for chunks in batches:
        step = packed_step(chunks, token_ids, tables, block_size)
        q, k, v = (torch.cat([case.qkv[c.sequence][i][c.start : c.stop] for c in chunks]) for i in range(3))
        q = kernels.rotate_and_store(q, k, v, step, rope, cache)
        heads = kernels.attend(q, step, cache, case.layout, case.window)
        for chunk, part in zip(chunks, heads.split([c.stop - c.start for c in chunks]), strict=True):
            results[chunk.sequence] = torch.cat((results[chunk.sequence], part)) if chunk.start else part
    return results


def run_alone(case, sequence):
    """One sequence as the only one, in one chunk."""
    alone = case._replace(qkv=[case.qkv[sequence]])
    return run(alone, [[Chunk(0, 0, len(case.qkv[sequence][0]))]], block_size=16)[0]


def naive(case, sequence):
    """The same in float64, straight from the definition."""
    q, k, v = (x.double().numpy() for x in case.qkv[sequence])
    length, half = len(q), case.layout.head_size // 2
    angles = np.arange(length)[:, None, None] * 100.0 ** (-np.arange(half) / half)
    cosine, sine = np.cos(angles), np.sin(angles)
    q, k = (np.concatenate((x[..., :half] * cosine - x[..., half:] * sine,
                            x[..., half:] * cosine + x[..., :half] * sine), -1) for x in (q, k))  # fmt: skip
    k, v = k[:, list(case.layout.kv_of_head)], v[:, list(case.layout.kv_of_head)]
    scores = np.einsum("qnh,knh->nqk", q, k) / np.sqrt(2 * half)
    age = np.arange(length)[:, None] - np.arange(length)
    scores[:, (age < 0) | ((age >= case.window) & (case.window > 0))] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    heads = np.einsum("nqk,knh->qnh", weights / weights.sum(-1, keepdims=True), v)
    return _into_grains(heads, case.layout)


def _into_grains(heads, layout):
    result = np.zeros((len(heads), len(layout.grain_heads), layout.heads_per_grain * layout.head_size))
    first = 0
    for grain, count in enumerate(layout.grain_heads):
        result[:, grain, : count * layout.head_size] = heads[:, first : first + count].reshape(len(heads), -1)
        first += count
    return result


HEADS = [((1,), 1), ((2, 2), 1), ((1, 1, 0, 0), 2), ((2, 2, 2, 2, 2, 2, 1, 1), 2), ((1, 0), 1), ((5,), 1), ((3, 3), 6)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("window", [0, 1, 5, 64, 70])
def test_attention_agrees_with_its_definition(heads, window):
    case = make_case([1, 64, 65, 200], *heads, window=window)
    batches = [[Chunk(s, 0, len(case.qkv[s][0])) for s in range(4)]]
    for sequence, found in enumerate(run(case, batches, block_size=16)):
        np.testing.assert_allclose(found, naive(case, sequence), rtol=1e-4, atol=1e-5)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=5),
    heads=st.sampled_from(HEADS),
    head_size=st.sampled_from([4, 16, 24, 64]),
    window=st.sampled_from([0, 1, 3, 63, 64, 65, 100]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    block_size=st.sampled_from([1, 3, 16, 48, 64, 100]),
    chunk=st.sampled_from([1, 2, 16, 17, 64, 150]),
    company=st.integers(1, 5),
)
def test_no_bit_depends_on_chunks_company_or_block_size(
    lengths, heads, head_size, window, dtype, block_size, chunk, company
):
    case = make_case(lengths, *heads, head_size=head_size, window=window, dtype=dtype)
    found = run(case, schedule(lengths, chunk, company), block_size)
    for sequence, result in enumerate(found):
        assert result.numpy().tobytes() == run_alone(case, sequence).numpy().tobytes()


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30, 0.0])
def test_unused_slots_are_never_read(garbage):
    case = make_case([70, 3], (2, 2), 2, window=10)
    found = run(case, schedule([70, 3], 20, 2), 16, garbage=garbage)
    assert all(torch.equal(result, run_alone(case, s)) for s, result in enumerate(found))


def test_heads_have_the_same_bits_whichever_rank_holds_them():
    case = make_case([100], (2, 2, 2, 1), 1)
    whole = run_alone(case, 0)
    for start, stop, grains in ((0, 4, (2, 2)), (4, 7, (2, 1)), (6, 7, (1,))):
        part = [tuple(x[:, start:stop] if x.shape[1] == 7 else x for x in case.qkv[0])]
        layout = HeadLayout(16, 2, grains, (0,) * (stop - start))
        found = run_alone(case._replace(qkv=part, layout=layout), 0)
        assert torch.equal(found, whole[:, start // 2 : start // 2 + len(grains)])


def test_no_heads_give_zeros():
    kernels = create_kernels("reference")
    layout = HeadLayout(16, 1, (0, 0), ())
    step = packed_step([Chunk(0, 0, 5)], [np.zeros(5, np.int64)], [np.arange(1)], 16)
    cache = kernels.kv_cache(1, 16, 0, 16, "float32")
    q = kernels.split_heads(torch.randn(5, 2, 16), layout)
    none = torch.empty(5, 0, 16)
    q = kernels.rotate_and_store(q, none, none, step, kernels.rope_table(8, 16, 100.0, SCALING), cache)
    assert torch.equal(kernels.attend(q, step, cache, layout, 0), torch.zeros(5, 2, 16))


@pytest.mark.parametrize("value", [1e30, -1e30, torch.inf, torch.nan])
def test_a_token_cannot_spoil_those_before_it(value):
    case = make_case([40], (1,), 1, dtype="float16")
    before = run_alone(case, 0)[:30]
    for i in (1, 2):
        case.qkv[0][i][30:] = value
    assert torch.equal(run_alone(case, 0)[:30], before)


def test_the_fallback_of_a_failed_probe_keeps_the_contract(monkeypatch):
    monkeypatch.setattr(reference_attention, "batches_are_alike", lambda num_in, num_out: False)
    case = make_case([70, 20], (2, 1), 1, window=30)
    for sequence, found in enumerate(run(case, schedule([70, 20], 16, 2), 16)):
        assert torch.equal(found, run_alone(case, sequence))
        np.testing.assert_allclose(found, naive(case, sequence), rtol=1e-4, atol=1e-5)


def test_split_heads_drops_padding():
    kernels = create_kernels("reference")
    x = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
    found = kernels.split_heads(x, HeadLayout(2, 2, (2, 0, 1), (0, 0, 0)))
    assert found.tolist() == [[[0, 1], [2, 3], [8, 9]], [[12, 13], [14, 15], [20, 21]]]
