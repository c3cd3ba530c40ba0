"""Whole halves of a layer: against the reference kernels, and no bit from chunks, company, block size or mesh."""

from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_sizes import Model
from random_weights import DTYPES, random_weight
from stages import poison
from steps import Chunk, block_tables, packed_step, schedule

from hpcinfer.config import RopeScaling
from hpcinfer.dtypes import int4_codes, to_float32
from hpcinfer.errors import ConfigError
from hpcinfer.kernels import create_kernels
from hpcinfer.kernels.protocol import AttentionShape, AttentionWeights, HeadLayout, Linear, MlpWeights

LENGTHS = [20, 3]
# of the largest result; the reference multiplies in float32, but rounds rows for int4 where these kernels do not, and
# does not for fp8 where they do
TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-2, "float16": 4e-3, "int8": 4e-2, "float8_e4m3": 8e-2, "int4": 4e-2}
small_model = partial(Model, hidden=40, head_size=12)  # the interpreter is slow


class Layer(NamedTuple):
    """What was prepared of a model."""

    attention: object
    mlp: object
    head: object


def prepare(kernels, model):
    random, layout, grains = np.random.default_rng(5), model.layout, len(model.grain_heads)
    columns = layout.heads_per_grain * layout.head_size

    def linear(units, num_out):
        bias = random.standard_normal((units, num_out), np.float32) if model.has_bias else None
        return Linear(random_weight(random, model.dtype, units, num_out, model.hidden), bias)

    norms = [np.abs(random.standard_normal(size, np.float32)) for size in (model.hidden, layout.head_size)]
    q, k, v = linear(grains, columns), *(linear(model.num_kv_heads, layout.head_size) for _ in range(2))
    o = random_weight(random, model.dtype, grains, model.hidden, columns)
    shape = AttentionShape(layout, 1e-5, kernels.rope_table(200, layout.head_size, 1e4, RopeScaling()), model.window)
    attention = kernels.prepare_attention(AttentionWeights(norms[0], q, k, v, o, norms[1], norms[1]), shape)
    gate, up = linear(grains, model.width), linear(grains, model.width)
    mlp = kernels.prepare_mlp(
        MlpWeights(norms[0], gate, up, random_weight(random, model.dtype, grains, model.hidden, model.width)), 1e-5
    )
    head = kernels.prepare_head(norms[0], random_weight(random, model.dtype, 2, 35, model.hidden), 1e-5)
    return Layer(attention, mlp, head)


def run(kernels, model, batches, block_size=16):
    """Attention, MLP and logits of all sequences, run in these batches: rows by sequence and position."""
    layer, random, spans = prepare(kernels, model), np.random.default_rng(6), [(0, 2), (2, 3)]
    xs = [random.standard_normal((length, model.hidden), np.float32) for length in LENGTHS]
    tables, num_blocks = block_tables(LENGTHS, block_size, seed=len(batches))
    cache = kernels.kv_cache(num_blocks, block_size, model.num_kv_heads, model.head_size, model.cache_dtype)
    spoil(cache, num_blocks)
    rows = [[None] * length for length in LENGTHS]
    for chunks in batches:
        step = packed_step(chunks, [np.zeros(length, np.int64) for length in LENGTHS], tables, block_size)
        x = np.concatenate([xs[c.sequence][c.start : c.stop] for c in chunks])
        nodes = kernels.attention(kernels.device(x), layer.attention, step, cache, spans)
        halves = kernels.mlp(kernels.device(x), layer.mlp, spans)
        logits = kernels.logits(kernels.device(x), step.logit_tokens, layer.head)
        found = [*(kernels.host(each) for each in (*nodes, *halves)), kernels.host(logits).reshape(len(x), -1)]
        parts = iter(np.concatenate(found, axis=1))
        for chunk in chunks:
            rows[chunk.sequence][chunk.start : chunk.stop] = [next(parts) for _ in range(chunk.start, chunk.stop)]
    return np.concatenate([np.stack(sequence) for sequence in rows])


def spoil(cache, num_blocks):
    """Fill a cache with NaN."""
    if not hasattr(cache, "block_size"):
        poison(cache, num_blocks)
        return
    for part in cache[:4]:
        if part is not None:
            part.view(torch.uint8).fill_(0xFF)


WHOLE = [[Chunk(s, 0, length) for s, length in enumerate(LENGTHS)]]
MODELS = [
    *(small_model(dtype, "float32") for dtype in DTYPES),
    *(small_model("float32", cache) for cache in ("bfloat16", "float16", "int8")),
    small_model("float16", "float16", window=9),
    small_model("int8", "int8", grain_heads=(1, 1, 0), num_kv_heads=1, width=70, has_bias=False),
    small_model("int4", "bfloat16", hidden=64, grain_heads=(3, 3, 3), num_kv_heads=3, width=33),
]


@pytest.mark.parametrize(
    "model, reproducible", [*((model, True) for model in MODELS), *((model, False) for model in MODELS[:4])], ids=str
)
def test_gpu_and_reference_kernels_agree(make, model, reproducible):
    found = run(make(reproducible=reproducible), model, WHOLE)
    expected = run(create_kernels("reference"), model, WHOLE)
    tolerance = max(TOLERANCE[model.dtype], TOLERANCE[model.cache_dtype])
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@settings(max_examples=3)
@given(
    model=st.sampled_from(MODELS), chunk=st.sampled_from([7, 20]), company=st.integers(1, 2),
    block_size=st.sampled_from([1, 8, 20, 64]),
)  # fmt: skip
def test_no_bit_depends_on_chunks_company_or_blocks(make, model, chunk, company, block_size):
    kernels = make()
    found = run(kernels, model, schedule(LENGTHS, chunk, company), block_size)
    assert found.tobytes() == run(kernels, model, WHOLE).tobytes()


def test_integers_are_copied_once_for_all_layers(make, monkeypatch):
    from hpcinfer.kernels.gpu import gpu

    copied, copy = [], gpu.DeviceStep
    monkeypatch.setattr(gpu, "DeviceStep", lambda step, device: copied.append(step) or copy(step, device))
    kernels, model = make(), small_model("float32", "float32", hidden=16, grain_heads=(1,), num_kv_heads=1, width=16)
    layer, cache = prepare(kernels, model).attention, kernels.kv_cache(4, 16, 1, 12, "float32")
    steps = [packed_step([Chunk(0, i, i + 1)], [np.zeros(3, np.int64)], [np.arange(4)], 16) for i in range(3)]
    for step in (*steps[:2] * 2, steps[2]):
        kernels.attention(kernels.device(np.ones((1, 16), np.float32)), layer, step, cache, [(0, 1)])
    assert list(map(id, copied)) == list(map(id, steps))


def test_sums_stand_where_they_are_wanted(make):
    kernels, model = make(), small_model("float32", "float32")
    layer, x = prepare(kernels, model), np.ones((3, 40), np.float32)
    room = kernels.empty((2, 3, 40))
    nodes = kernels.mlp(kernels.device(x), layer.mlp, [(0, 2), (2, 3)], room)
    assert [node.data_ptr() for node in nodes] == [part.data_ptr() for part in room]
    elsewhere = kernels.mlp(kernels.device(x), layer.mlp, [(0, 2), (2, 3)], np.empty((2, 3, 40), np.float32))
    assert all(torch.equal(a, b) for a, b in zip(nodes, elsewhere, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_table_are_copied(make, dtype):
    kernels, reference = make(), create_kernels("reference")
    table = random_weight(np.random.default_rng(1), dtype, 2, 6, 40)
    if dtype == "float32":
        table.values[0, 0, 0] = -0.0
    ids = np.array([4, 0, 3, 9, 10, 13, 16, 2])  # 4, 9 and 16 are foreign: the sizes below leave them out
    expected = reference.embed(reference.prepare_table(table), (0, 10), (4, 6), ids).numpy()
    found = kernels.host(kernels.embed(kernels.prepare_table(table), (0, 10), (4, 6), ids))
    np.testing.assert_array_equal(found, expected)
    assert not np.signbit(found[found == 0]).any() and not kernels.keeps_table(dtype)


def test_products_may_be_made_in_another_type(make):
    model = small_model("float16", "float32")
    exact, expected = (run(kernels, model, WHOLE) for kernels in (make(dtype="float32"), create_kernels("reference")))
    assert np.abs(exact - expected).max() <= TOLERANCE["float32"] * np.abs(expected).max()
    with pytest.raises(ConfigError, match="'float8'"):
        make(dtype="float8")


@pytest.mark.parametrize("units", [range(3), range(1, 2), range(0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_units_come_back_as_they_were(make, dtype, units):
    kernels, random, outs = make(), np.random.default_rng(3), range(2, 5)
    norm, layout = np.ones(72, np.float32), HeadLayout(24, 2, (2, 2, 1), (0, 0, 0, 1, 2))
    shapes = {"q_proj": (3, 48, 72), "k_proj": (3, 24, 72), "v_proj": (3, 24, 72), "o_proj": (3, 72, 48),
              "gate_proj": (3, 40, 72), "up_proj": (3, 40, 72), "down_proj": (3, 72, 40), "lm_head": (3, 35, 72),
              "embed_tokens": (3, 35, 72)}  # fmt: skip
    weights = {name: random_weight(random, dtype, *shape) for name, shape in shapes.items()}
    q, k, v, gate, up = (Linear(weights[f"{name}_proj"]) for name in ("q", "k", "v", "gate", "up"))
    shape = AttentionShape(layout, 1e-5, kernels.rope_table(8, 24, 1e4, RopeScaling()))
    attention = kernels.prepare_attention(AttentionWeights(norm, q, k, v, weights["o_proj"]), shape)
    mlp = kernels.prepare_mlp(MlpWeights(norm, gate, up, weights["down_proj"]), 1e-5)
    others = {"lm_head": kernels.prepare_head(norm, weights["lm_head"], 1e-5),
              "embed_tokens": kernels.prepare_table(weights["embed_tokens"])}  # fmt: skip
    for name, weight in weights.items():
        prepared = others.get(name, mlp if name in ("gate_proj", "up_proj", "down_proj") else attention)
        found = kernels.give_back(prepared, name, units)
        if dtype == "int4" and name == "embed_tokens":
            assert found is None  # it is kept as float32
            continue
        rows = slice(units.start, units.stop)
        assert_same(found, weight, rows)
        assert_same(kernels.give_back(prepared, name, units, outs), weight, (rows, slice(2, 5)))


def assert_same(found, weight, place):
    values = weight.values[place]
    if weight.dtype == "int4":
        np.testing.assert_array_equal(int4_codes(found.values), int4_codes(values))
    else:
        expected = values if weight.scales is not None else to_float32(values, weight.dtype)
        np.testing.assert_array_equal(found.values, expected)
    if weight.scales is not None:
        np.testing.assert_array_equal(found.scales, weight.scales[place])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "fp8"])
def test_kv_bytes_are_those_of_the_cache(make, dtype):
    kernels = make()
    cache = kernels.kv_cache(5, 16, 2, 20, dtype)
    assert sum(part.nbytes for part in cache[:4] if part is not None) == 5 * 16 * 2 * kernels.kv_bytes(20, dtype)


def test_arrays_are_copied_and_residuals_added(make):
    kernels, values = make(), np.arange(6, dtype=np.float32).reshape(3, 2)
    x = kernels.device(values)
    assert kernels.host(kernels.add_residual(x, kernels.device(values))).tolist() == (2 * values).tolist()
    assert values[1, 1] == 3
    x = kernels.add_residual(kernels.device(values), x, kernels.vector(np.array([1, -1])))
    assert kernels.host(x).tolist() == [[1, 2], [7, 8], [13, 14]]
    assert kernels.host(kernels.join([x[:1], x[2:]])).tolist() == [[1, 2], [13, 14]]
    assert kernels.phase_seconds() == {} and kernels.empty((2, 3)).shape == (2, 3)


def test_profiles_name_what_fixes_the_bits(make):
    profile, other = (make(reproducible=reproducible).profile() for reproducible in (True, False))
    assert set(profile) == {"kernels", "device", "capability", "torch", "triton", "cuda", "fp8_weights", "probe"}
    assert len(profile["probe"]) == 16 and other["kernels"] != profile["kernels"] and other["probe"] != profile["probe"]
    assert make().profile() == profile


def test_a_cpu_without_the_interpreter_is_refused(device, monkeypatch):
    from hpcinfer.kernels.gpu import create_gpu_kernels

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="on a CPU"):
        create_gpu_kernels(torch.device("cpu"))
