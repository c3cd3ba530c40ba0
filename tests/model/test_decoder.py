"""Logits against transformers, and one answer on every mesh.

The relative error of a model is max |ours - theirs| / max |theirs| over all logits of all positions; the bound is 1e-4.
"""

import threading
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from models import make_tiny_model
from stages import MemoryStore, make_stage, native_was_built, run_replica
from steps import Chunk, block_tables, packed_step
from thread_group import run_ranks

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.comm.tree import TreeReducer
from hpcinfer.comm.waiting import turn_meanwhile, work_meanwhile
from hpcinfer.kernels import create_kernels
from hpcinfer.kernels.reference import ReferenceKernels
from hpcinfer.model.decoder import CacheShape
from hpcinfer.partition.mesh import Coord, Mesh

TOLERANCE = 1e-4
LENGTHS = (1, 70, 33, 2)
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
MODELS = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama3", {}),
    "linear rope": ("llama", {"rope_parameters": LINEAR}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2 14/2 heads": ("qwen2", {"num_attention_heads": 14, "hidden_size": 56, "intermediate_size": 100}),
    "qwen2 window from layer 1": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "one KV head": ("llama", {"num_key_value_heads": 1}),
    "one KV head per head": ("llama", {"num_key_value_heads": 4}),
    "odd widths": (
        "llama", {"hidden_size": 42, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 77}),
}  # fmt: skip
MESHES = [(2, 1), (3, 1), (4, 1), (1, 2), (2, 2), (1, 3)]  # tp, pp


class Tiny(NamedTuple):
    """A tiny model: cut into grains, by transformers, and some prompts with transformers' logits."""

    kernels: str
    store: MemoryStore
    model: torch.nn.Module
    token_ids: list[np.ndarray]
    expected: list[np.ndarray]


@pytest.fixture(scope="module", params=["reference", "native"])
def kernels(request):
    if request.param == "native" and not native_was_built():
        pytest.skip("the native kernels were not built")
    return request.param


@pytest.fixture(scope="module", params=MODELS)
def tiny(request, kernels, tmp_path_factory):
    from transformers import AutoModelForCausalLM

    family, overrides = MODELS[request.param]
    folder = make_tiny_model(tmp_path_factory.mktemp("tiny"), family, **overrides)
    store, model = MemoryStore(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    random = np.random.default_rng(0)
    token_ids = [random.integers(0, store.config.vocab_size, length) for length in LENGTHS]
    with torch.no_grad():
        expected = [model(torch.from_numpy(ids)[None]).logits[0].numpy() for ids in token_ids]
    return Tiny(kernels, store, model, token_ids, expected)


def same_bits(found, expected):
    return all(a.tobytes() == b.tobytes() for a, b in zip(found, expected, strict=True))


def test_logits_agree_with_transformers(tiny):
    found = run_replica(tiny.store, tiny.token_ids, kernels=tiny.kernels)
    scale = max(np.abs(logits).max() for logits in tiny.expected)
    error = max(np.abs(a - b).max() for a, b in zip(found, tiny.expected, strict=True))
    assert error <= TOLERANCE * scale


def test_logits_have_the_same_bits_on_every_mesh(tiny):
    expected = run_replica(tiny.store, tiny.token_ids, kernels=tiny.kernels)
    for tp, pp in MESHES:
        found = run_replica(tiny.store, tiny.token_ids, tp=tp, pp=pp, chunk=40, company=3, block_size=7,
                            kernels=tiny.kernels)  # fmt: skip
        assert same_bits(found, expected), f"{tp = } {pp = }"


def test_logits_have_the_same_bits_in_halves_whose_sums_overlap(tiny):
    expected = run_replica(tiny.store, tiny.token_ids, kernels=tiny.kernels)
    for tp, pp, chunk in ((2, 1, 1000), (3, 1, 40), (2, 2, 7)):
        found = run_replica(tiny.store, tiny.token_ids, tp=tp, pp=pp, chunk=chunk, kernels=tiny.kernels,
                            overlap="always")  # fmt: skip
        assert same_bits(found, expected), f"{tp = } {pp = } {chunk = }"


def test_logits_have_the_same_bits_with_any_threads(tiny):
    if tiny.kernels != "native":
        pytest.skip("the reference kernels have one thread")
    expected = run_replica(tiny.store, tiny.token_ids, kernels="native")
    for threads in (2, 3):
        found = run_replica(tiny.store, tiny.token_ids, kernels="native", threads=threads, chunk=30, tp=2)
        assert same_bits(found, expected), f"{threads = }"


def test_logits_have_the_same_bits_in_any_chunks_and_company(tiny):
    expected = run_replica(tiny.store, tiny.token_ids, cache="bfloat16", dtype="bfloat16", kernels=tiny.kernels)
    for chunk, company, block_size in ((3, 4, 16), (40, 1, 5)):
        found = run_replica(tiny.store, tiny.token_ids, chunk=chunk, company=company, block_size=block_size,
                            cache="bfloat16", dtype="bfloat16", kernels=tiny.kernels)  # fmt: skip
        assert same_bits(found, expected)


def test_greedy_tokens_are_those_of_transformers(tiny):
    """Wherever the reference's two best logits differ by more than ten times the tolerance."""
    prompt = tiny.token_ids[2][:5]
    whole = tiny.model.generate(torch.from_numpy(prompt)[None], max_new_tokens=20, min_new_tokens=20, do_sample=False,
                                output_logits=True, return_dict_in_generate=True)  # fmt: skip
    ids = whole.sequences[0].numpy()
    reference = torch.cat(whole.logits).numpy()
    [found] = run_replica(tiny.store, [ids[:-1]], chunk=5, kernels=tiny.kernels)
    best = np.sort(reference, axis=1)
    is_clear = best[:, -1] - best[:, -2] > 10 * TOLERANCE * np.abs(reference).max()
    assert is_clear.mean() >= 0.95
    choices = found[len(prompt) - 1 :].argmax(1)
    assert (choices == reference.argmax(1))[is_clear].all()


def test_no_rows_of_logits_may_be_asked_for(tmp_path):
    store = MemoryStore(make_tiny_model(tmp_path, "llama", num_hidden_layers=1))
    tables, num_blocks = block_tables([3], 16)
    step = packed_step([Chunk(0, 0, 3)], [np.arange(3)], tables, 16)
    shape = CacheShape(num_blocks, 16, "float32")

    def forward(group):
        stage = make_stage(store, Mesh(1, 1, 1), Coord(0, 0, 0), group, shape)
        return stage.forward(replace(step, logit_tokens=np.empty(0, np.int64)))

    [logits] = run_ranks(1, forward)
    assert logits.shape == (0, 8, 64) and np.asarray(logits).dtype == np.float32


class Recording:
    """Kernels that run the layers with a batch of their own, as those do that record."""

    def __init__(self):
        self._kernels, self.calls = create_kernels("reference"), []

    def __getattr__(self, name):
        return getattr(self._kernels, name)

    def run_layers(self, step, hidden, work, owner, *, is_alone):
        self.calls.append((owner, is_alone))
        return work(replace(step), hidden) if len(self.calls) > 1 else work(step, hidden)


@pytest.mark.parametrize("tp", [1, 2])
def test_layers_are_recorded_where_sums_can_be(tmp_path, monkeypatch, tp):
    store = MemoryStore(make_tiny_model(tmp_path, "llama", num_hidden_layers=2))
    tables, num_blocks = block_tables([3], 16)
    step = packed_step([Chunk(0, 0, 3)], [np.arange(3)], tables, 16)
    if tp == 2:
        monkeypatch.setattr(TreeReducer, "is_recordable", True)

    def forward(group):
        kernels, layers = Recording(), []
        place, shape = Coord(0, 0, group.rank), CacheShape(num_blocks, 16, "float32")
        stage = make_stage(store, Mesh(1, 1, tp), place, group, shape, kernels=kernels)
        logits = [np.asarray(stage.forward(step, None, lambda: layers.append(len(kernels.calls)))) for _ in range(2)]
        assert kernels.calls == [(stage, tp == 1)] * 2
        assert layers == [1, 1]  # not while layers may be recorded
        return logits

    for first, second in run_ranks(tp, forward):
        assert first.tobytes() == second.tobytes()


def test_halves_whose_sums_overlap_are_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(TreeReducer, "is_recordable", True)
    monkeypatch.setattr(ReferenceKernels, "run_layers", None)
    store = MemoryStore(make_tiny_model(tmp_path, "llama", num_hidden_layers=1))
    run_replica(store, [np.arange(4), np.arange(5)], tp=2, overlap="always")


def test_partial_sums_of_native_kernels_stand_where_other_ranks_read(tmp_path, monkeypatch):
    if not native_was_built():
        pytest.skip("the native kernels were not built")
    given, are_there = threading.local(), []
    room, start = TreeReducer.room, TreeReducer.start

    def remember(reducer, shape):
        given.room = room(reducer, shape)
        return given.room

    def look(reducer, nodes):
        if (wanted := getattr(given, "room", None)) is not None:
            are_there.append(all(np.shares_memory(node, part) for node, part in zip(nodes, wanted, strict=True)))
        return start(reducer, nodes)

    monkeypatch.setattr(TreeReducer, "room", remember)
    monkeypatch.setattr(TreeReducer, "start", look)
    store = MemoryStore(make_tiny_model(tmp_path, "llama"))
    run_replica(store, [np.arange(7)], tp=3, kernels="native")
    assert are_there == [True] * 3 * 2 * store.config.num_layers


def test_native_kernels_run_all_layers_at_once_where_a_rank_is_alone(tmp_path):
    if not native_was_built():
        pytest.skip("the native kernels were not built")
    store, kernels = MemoryStore(make_tiny_model(tmp_path, "llama")), create_kernels("native")
    tables, num_blocks = block_tables([5], 16)
    step, shape = packed_step([Chunk(0, 0, 5)], [np.arange(5)], tables, 16), CacheShape(num_blocks, 16, "float32")
    stage = make_stage(store, Mesh(1, 1, 1), Coord(0, 0, 0), SerialGroup(), shape, kernels=kernels)
    expected, layers = stage.forward(step), []
    work_meanwhile(lambda: False)  # messages that move on between layers
    np.testing.assert_array_equal(stage.forward(step, each_layer=lambda: layers.append(len(layers))), expected)
    assert len(layers) == store.config.num_layers
    turn_meanwhile()
    kernels.attention = kernels.mlp = None  # halves are not called
    np.testing.assert_array_equal(stage.forward(step), expected)
