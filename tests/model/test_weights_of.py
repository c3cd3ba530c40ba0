import threading
import weakref

import numpy as np
import pytest
import torch
from models import make_tiny_model
from stages import MemoryStore

from hpcinfer.kernels import create_kernels
from hpcinfer.model.shard import shard_plan
from hpcinfer.model.weights_of import LoadOptions, load_parts, load_stage
from hpcinfer.partition.mesh import Coord, Mesh


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    return MemoryStore(make_tiny_model(folder, "qwen2", num_hidden_layers=2, tie_word_embeddings=True))


def load(store, pp, stage, tp=1, rank=0, dtype="auto"):
    store.reads.clear()
    plan = shard_plan(store.config, store.grains, Mesh(1, pp, tp), Coord(0, stage, rank))
    return load_stage(store, create_kernels("reference"), plan, LoadOptions(dtype, max_len=64))


def test_a_rank_reads_its_grains_once(store):
    load(store, 2, 0, tp=3, rank=2)
    reads = dict(store.reads)
    assert len(reads) == len(store.reads) and not any(name.startswith("layers.1.") for name in reads)
    assert reads["embed_tokens.weight"] == reads["layers.0.down_proj.weight"] == range(6, 8)
    assert reads["layers.0.k_proj.bias"] == range(0)  # 4 heads over 8 grains: the last four have none


def test_the_last_stage_of_a_tied_model_reads_the_embedding_too(store):
    first, last = load(store, 2, 0), load(store, 2, 1)
    assert first.head is None and last.embed is None
    grains, _, hidden = first.embed.shape
    assert torch.equal(last.head.weight.grains[:, :, :hidden], first.embed) and len(last.head.weight.grains) == grains
    whole = load(store, 1, 0)
    assert None not in (whole.head, whole.embed)
    assert [name for name, _ in store.reads].count("embed_tokens.weight") == 1


def test_what_fails_while_it_is_read_ahead_fails_the_load(store, monkeypatch):
    read = store.read

    def fail(name, units=None):
        if name == "layers.1.post_attention_layernorm.weight":
            raise OSError(f"no {name}")
        return read(name, units)

    monkeypatch.setattr(store, "read", fail)
    num_threads = threading.active_count()
    with pytest.raises(OSError, match=r"no layers\.1\.post_attention_layernorm"):
        load(store, 1, 0)
    assert threading.active_count() == num_threads


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_to_the_precision_asked_for(store, dtype):
    exact, rounded = load(store, 1, 0, dtype="float32").layers[1], load(store, 1, 0, dtype=dtype).layers[1]
    for half, name in (("attention", "q"), ("mlp", "gate")):
        expected = getattr(getattr(exact, half), name).weight.grains.to(getattr(torch, dtype)).float()
        assert torch.equal(getattr(getattr(rounded, half), name).weight.grains, expected)
    norm = exact.attention.norm
    assert torch.equal(rounded.attention.norm, norm.to(getattr(torch, dtype)).float())
    assert not np.array_equal(rounded.attention.norm, norm)


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_table_is_let_go_once_it_is_prepared(tmp_path, monkeypatch, is_tied):
    store = MemoryStore(make_tiny_model(tmp_path, "qwen2", num_hidden_layers=2, tie_word_embeddings=is_tied))
    read_weight, tables = store.read_weight, []

    def remember(name, units=None):
        found = read_weight(name, units)
        values = found[0].copy()
        if name == "embed_tokens.weight":
            tables.append(weakref.ref(values))
        return values, *found[1:]

    monkeypatch.setattr(store, "read_weight", remember)
    plan = shard_plan(store.config, store.grains, Mesh(1, 1, 1), Coord(0, 0, 0))
    parts = load_parts(store, create_kernels("reference"), plan, LoadOptions(max_len=64))
    next(parts), next(parts)
    assert (tables[0]() is not None) == is_tied  # a tied one is the head, too
    assert len(list(parts)) == 2 and len(tables) == 1
