from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.config import ModelConfig
from hpcinfer.errors import MeshError
from hpcinfer.model.shard import head_layout, kv_bytes_per_token, kv_heads, shard_plan, vocab_ranges
from hpcinfer.partition.mesh import Coord, Mesh

CONFIG = ModelConfig("LlamaForCausalLM", 64, 5, 14, 2, 16, 100, 390, 256, 1e-5, 10000.0)


def plans(config, mesh):
    return [shard_plan(config, 8, mesh, Coord(0, p, t)) for p in range(mesh.pp) for t in range(mesh.tp)]


@given(tp=st.integers(1, 8), pp=st.integers(1, 5), num_kv_heads=st.integers(1, 6), group=st.integers(1, 7))
def test_every_head_and_layer_is_held_once(tp, pp, num_kv_heads, group):
    config = replace(CONFIG, num_heads=num_kv_heads * group, num_kv_heads=num_kv_heads)
    mesh = Mesh(1, pp, tp)
    held = plans(config, mesh)
    assert [layer for plan in held[::tp] for layer in plan.layers] == list(range(5))
    assert [plan.is_first for plan in held] == [True] * tp + [False] * (pp - 1) * tp
    assert sum(plan.is_last for plan in held) == tp
    first_stage = held[:tp]
    heads = [kv_heads(config, plan).start + kv for plan in first_stage for kv in head_layout(config, plan).kv_of_head]
    assert heads == [head // group for head in range(config.num_heads)]
    assert [i for plan in first_stage for ids in vocab_ranges(config, plan) for i in ids] == list(range(390))


@given(tp=st.integers(1, 8))
def test_layouts_fit_their_grains(tp):
    for plan in plans(CONFIG, Mesh(1, 1, tp)):
        layout = head_layout(CONFIG, plan)
        assert len(layout.grain_heads) == len(plan.run) and max(layout.grain_heads) <= layout.heads_per_grain == 2
        assert len(layout.kv_of_head) == sum(layout.grain_heads)
        assert set(layout.kv_of_head) == set(range(len(kv_heads(CONFIG, plan))))


def test_kv_bytes_count_layers_and_heads():
    [plan] = plans(CONFIG, Mesh(1, 1, 1))
    assert kv_bytes_per_token(CONFIG, plan, 128) == 5 * 2 * 128
    # tp=2: heads 0-7 read both KV heads, heads 8-13 the second only.
    assert [kv_bytes_per_token(CONFIG, plan, 64) for plan in plans(CONFIG, Mesh(1, 5, 2))] == [128, 64] * 5


def test_ranks_without_heads_need_no_cache():
    config = replace(CONFIG, num_heads=2, num_kv_heads=2)
    sizes = [kv_bytes_per_token(config, plan, 128) for plan in plans(config, Mesh(1, 1, 4))]
    assert sizes == [5 * 2 * 128, 0, 0, 0]


def test_too_many_ranks_are_refused():
    with pytest.raises(MeshError, match="more shards"):
        shard_plan(CONFIG, 8, Mesh(1, 1, 9), Coord(0, 0, 0))
    with pytest.raises(MeshError, match="more stages"):
        shard_plan(CONFIG, 8, Mesh(1, 6, 1), Coord(0, 0, 0))
