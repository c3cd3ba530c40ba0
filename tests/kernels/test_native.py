"""Whole halves of a layer: native against reference kernels, and no bit from threads, vectors or company."""


import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_sizes import Model
from random_weights import DTYPES, random_weight
from stages import native_was_built, poison
from steps import Chunk, block_tables, packed_step, schedule

from hpcinfer.config import RopeScaling
from hpcinfer.kernels import Placement, create_kernels
from hpcinfer.kernels.native.library import instruction_sets, load
from hpcinfer.kernels.protocol import (
    AttentionShape,
    AttentionWeights,
    HeadLayout,
    Linear,
    MlpWeights,
)

pytestmark = pytest.mark.skipif(not native_was_built(), reason="the native kernels were not built")

LENGTHS = [70, 5, 130, 1]
TOLERANCE = {**dict.fromkeys(DTYPES, 2e-5), "int8": 2e-2, "int4": 2e-2}  # a code may differ by one


def run(kernels, model, batches, block_size=16):
    """Attention, MLP and logits of all sequences, run in these batches: rows by sequence and position."""
    random = np.random.default_rng(5)
    layout, grains = model.layout, len(model.grain_heads)
    columns = layout.heads_per_grain * layout.head_size

    def linear(units, num_out):
        bias = random.standard_normal((units, num_out), np.float32) if model.has_bias else None
        return Linear(random_weight(random, model.dtype, units, num_out, model.hidden), bias)

    norms = [np.abs(random.standard_normal(size, np.float32)) for size in (model.hidden, layout.head_size)]
    q, k, v = linear(grains, columns), linear(model.num_kv_heads, 24), linear(model.num_kv_heads, 24)
    o = random_weight(random, model.dtype, grains, model.hidden, columns)
    rope = kernels.rope_table(200, layout.head_size, 1e4, RopeScaling())
    attention = kernels.prepare_attention(
        AttentionWeights(norms[0], q, k, v, o, norms[1], norms[1]), AttentionShape(layout, 1e-5, rope, model.window)
    )
    gate, up = linear(grains, model.width), linear(grains, model.width)
    down = random_weight(random, model.dtype, grains, model.hidden, model.width)
    mlp = kernels.prepare_mlp(MlpWeights(norms[0], gate, up, down), 1e-5)
    head = kernels.prepare_head(norms[0], random_weight(random, model.dtype, 2, 35, model.hidden), 1e-5)
    xs = [random.standard_normal((length, model.hidden), np.float32) for length in LENGTHS]
    tables, num_blocks = block_tables(LENGTHS, block_size, seed=len(batches))
    cache = kernels.kv_cache(num_blocks, block_size, model.num_kv_heads, layout.head_size, model.cache_dtype)
    poison(cache, num_blocks)
    parts = []
    for chunks in batches:
        step = packed_step(chunks, [np.zeros(length, np.int64) for length in LENGTHS], tables, block_size)
        x = np.concatenate([xs[c.sequence][c.start : c.stop] for c in chunks])
        nodes = kernels.attention(kernels.device(x), attention, step, cache, [(0, 2), (2, 3)])
        halves = kernels.mlp(kernels.device(x), mlp, [(0, 2), (2, 3)])
        logits = kernels.logits(kernels.device(x), step.logit_tokens, head)
        arrays = [kernels.host(each) for each in (*nodes, *halves)] + [kernels.host(logits).reshape(len(x), -1)]
        parts.append(np.concatenate(arrays, axis=1))
    return _by_position(batches, parts)


def _by_position(batches, parts):
    rows = [[None] * length for length in LENGTHS]
    for chunks, part in zip(batches, parts, strict=True):
        at = iter(part)
        for chunk in chunks:
            for position in range(chunk.start, chunk.stop):
                rows[chunk.sequence][position] = next(at)
    return np.concatenate([np.stack(sequence) for sequence in rows])


WHOLE = [[Chunk(s, 0, length) for s, length in enumerate(LENGTHS)]]
MODELS = [
    *(Model(dtype, "float32") for dtype in DTYPES),
    *(Model("float32", cache) for cache in ("bfloat16", "float16", "int8")),
    Model("float32", "float32", window=9),
    Model("int8", "int8", grain_heads=(1, 1, 0), num_kv_heads=1, head_size=24, width=64, has_bias=False),
    Model("int4", "bfloat16", hidden=64, grain_heads=(3, 3, 3), num_kv_heads=3, width=96),
]


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_native_and_reference_kernels_agree(model):
    found, expected = (run(create_kernels(name), model, WHOLE) for name in ("native", "reference"))
    tolerance = max(TOLERANCE[model.dtype], 2e-2 if model.cache_dtype == "int8" else 0)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_heads_that_a_grain_does_not_hold_are_left_out_of_products():
    random, kernels = np.random.default_rng(0), create_kernels("native")
    layout = HeadLayout(64, 2, (2, 2, 1), (0, 0, 0, 0, 0))
    q, k, v = (Linear(random_weight(random, "int8", *sizes, 32)) for sizes in ((3, 128), (1, 64), (1, 64)))
    weights = AttentionWeights(np.ones(32, np.float32), q, k, v, random_weight(random, "int8", 3, 32, 128))
    shape = AttentionShape(layout, 1e-5, kernels.rope_table(8, 64, 1e4, RopeScaling()))
    layer = kernels.prepare_attention(weights, shape)
    qkv, o = layer.struct.qkv, layer.struct.o
    assert [qkv.listed_panels[i] for i in range(qkv.num_listed)] == [*range(10), *range(12, 16)]
    assert [o.true_inputs[grain] for grain in range(3)] == [128, 128, 64]


@settings(max_examples=20)
@given(
    model=st.sampled_from(MODELS), threads=st.sampled_from([1, 2, 3]), chunk=st.sampled_from([1, 7, 64, 130]),
    company=st.integers(1, 4), block_size=st.sampled_from([1, 8, 16, 20, 64]),
)  # fmt: skip
def test_no_bit_depends_on_threads_chunks_company_or_blocks(model, threads, chunk, company, block_size):
    kernels = create_kernels("native", placement=Placement(threads, None))
    found = run(kernels, model, schedule(LENGTHS, chunk, company), block_size)
    assert found.tobytes() == run(create_kernels("native"), model, WHOLE).tobytes()


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_no_bit_depends_on_the_instruction_set(model, monkeypatch):
    expected = run(create_kernels("native"), model, WHOLE)
    for name in instruction_sets(load(local_rank=None))[1:]:  # all that this machine has
        monkeypatch.setenv("HPCINFER_SIMD", name)
        assert run(create_kernels("native"), model, WHOLE).tobytes() == expected.tobytes(), name


def test_profiles_are_equal_for_threads_and_instruction_sets(monkeypatch):
    expected = create_kernels("native").profile()
    assert expected["kernels"].startswith("native-") and expected["fp8_weights"] == "float32 products"
    assert create_kernels("native", placement=Placement(2, None)).profile() == expected
    monkeypatch.setenv("HPCINFER_SIMD", "plain")
    assert create_kernels("native").profile() == expected


def test_seconds_are_counted_by_phase():
    kernels = create_kernels("native")
    run(kernels, MODELS[0], WHOLE)
    seconds = kernels.phase_seconds()
    assert set(seconds) == {"products", "attention", "other kernels", "sampling"} and seconds.pop("sampling") == 0
    assert min(seconds.values()) > 0
    kernels.argmax(np.zeros((2, 1, 5000), np.float32), (5000,))
    assert kernels.phase_seconds()["sampling"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_kv_bytes_are_those_of_the_cache(dtype):
    kernels = create_kernels("native")
    more, less = (kernels.kv_cache(blocks, 16, 2, 20, dtype).memory().nbytes for blocks in (516, 4))
    assert more - less == 512 * 16 * 2 * kernels.kv_bytes(20, dtype)
