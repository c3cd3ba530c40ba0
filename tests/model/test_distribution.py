"""Of any job and any copies on its nodes: who needs a unit gets it, from one reader, and nobody else does."""

import zlib
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcinfer.config import ModelConfig
from hpcinfer.model.distribution import Job, StoredKind, distribute, needed_units, portion_of
from hpcinfer.model.portions import portions_of
from hpcinfer.model.shard import kv_heads, shard_plan
from hpcinfer.partition.mesh import Mesh
from hpcinfer.weights.schema import stored_specs

GRAINS = 8


def make_job(meshes, nodes, *, layers=4, heads=(6, 2), is_tied=False, quantization="none", scale=1):
    """Replicas of these meshes (pp, tp) on consecutive ranks."""
    config = ModelConfig("LlamaForCausalLM", 64 * scale, layers, *heads, 16, 200 * scale, 390, 256, 1e-5, 1e4,
                         tie_word_embeddings=is_tied, qkv_bias=True, o_bias=True, qk_norm=True)  # fmt: skip
    plans, first = {}, 0
    for pp, tp in meshes:
        mesh = Mesh(1, pp, tp)
        plans.update({first + place: shard_plan(config, GRAINS, mesh, mesh.coord(place)) for place in range(pp * tp)})
        first += pp * tp
    kinds = []
    for spec in stored_specs(config, GRAINS, quantization):
        num_bytes = 2
        for size in spec.shape[1:]:
            num_bytes *= size
        kinds.append(StoredKind(spec, num_bytes))
    return Job(config, kinds, plans, [nodes[rank % len(nodes)] for rank in range(first)])


jobs = st.builds(
    make_job,
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=4),
    st.lists(st.integers(0, 3), min_size=1, max_size=7),
    is_tied=st.booleans(),
    quantization=st.sampled_from(["none", "int8", "fp8", "int4"]),
    heads=st.sampled_from([(6, 2), (8, 8), (3, 1), (16, 4)]),
)


def copies_of(job, choice):
    """Random copies: those of one node are there for all of its ranks."""
    return lambda rank, name, unit: zlib.crc32(f"{name} {unit} {job.nodes[rank]}".encode()) % 4 < choice


@settings(max_examples=40)
@given(jobs, st.integers(0, 4), st.sampled_from([1, 3000, 10**9]))
def test_every_needed_unit_comes_once_and_nothing_else_does(job, choice, request_bytes):
    is_staged = copies_of(job, choice) if choice else None
    runs = list(distribute(job, is_staged, request_bytes))
    readers = Counter((run.name, unit) for run in runs if not run.is_staged for unit in run.units)
    assert not readers or max(readers.values()) == 1
    for run in runs:
        assert run.reader in run.needers and len(set(run.needers)) == len(run.needers)
        has_copy = {is_staged(run.reader, run.name, unit) for unit in run.units} if is_staged else {False}
        assert has_copy == {run.is_staged}, "who has a copy reads that, and only that"
    got = Counter((rank, run.name, unit) for run in runs for rank in run.needers for unit in run.units)
    needed = {
        (rank, spec.name, unit)
        for rank, plan in job.plans.items()
        for spec, _ in job.kinds
        for unit in needed_units(job.config, plan, spec)
    }
    assert got == Counter(needed)


@settings(max_examples=40)
@given(jobs, st.integers(0, 4), st.booleans())
def test_memory_of_several_ranks_has_one_writer_and_each_other_rank_is_told(job, choice, by_rank):
    table = "embed_tokens.weight"
    job = replace(job, common=frozenset([table]))

    def is_staged(rank, name, unit):
        return zlib.crc32(f"{name} {unit} {rank if by_rank else job.nodes[rank]}".encode()) % 4 < choice

    writers, told = Counter(), Counter()
    for rank, plan in job.plans.items():
        spec = next(kind.spec for kind in job.kinds if kind.spec.name == table)
        for portion in portions_of(job, distribute(job, is_staged, 3000), rank):
            for share in portion.shares:
                if share.name != table:
                    assert not share.is_told and not share.told
                    continue
                memory = (job.nodes[rank], needed_units(job.config, plan, spec))
                writers.update((memory, unit) for unit in share.units if not share.is_told)
                told.update((rank, unit) for unit in share.units if share.is_told)
                told.subtract((other, unit) for unit in share.units for other in share.told)
    assert not writers or max(writers.values()) == 1
    assert not any(told.values())


@settings(max_examples=40)
@given(jobs, st.integers(0, 4))
def test_what_a_rank_sends_is_what_others_expect_in_the_same_order(job, choice):
    is_staged = copies_of(job, choice) if choice else None
    portions = {rank: portions_of(job, distribute(job, is_staged, 3000), rank) for rank in job.plans}
    shares = {rank: [share for portion in portions[rank] for share in portion.shares] for rank in portions}
    for rank in portions:
        for peer in portions:
            sent = [share[:2] for share in shares[rank] if peer in share.receivers]
            assert sent == [share[:2] for share in shares[peer] if share.sender == rank]
        for portion in portions[rank]:
            units = Counter((share.name, unit) for share in portion.shares for unit in share.units)
            assert units == Counter((name, unit) for name, units in portion.needs.items() for unit in units)
            numbers = {portion_of(name, job.config.num_layers) for name in portion.needs}
            assert len(numbers) == 1


@settings(max_examples=40)
@given(jobs)
def test_what_crosses_the_network_does_so_once_for_each_node(job):
    crossings = Counter()
    for rank in job.plans:
        for portion in portions_of(job, distribute(job, None, 3000), rank):
            for share in portion.shares:
                if share.sender is not None and job.nodes[share.sender] != job.nodes[rank]:
                    crossings.update((share.name, unit, job.nodes[rank]) for unit in share.units)
    assert not crossings or max(crossings.values()) == 1


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 8, 100])
def test_nobody_sends_to_more_nodes_than_a_binomial_tree_has_levels(num_nodes):
    job = make_job([(1, 2)] * num_nodes, [node for node in range(num_nodes) for _ in range(2)], layers=1)
    parents = {}
    for rank in job.plans:
        for share in (share for portion in portions_of(job, distribute(job), rank) for share in portion.shares):
            far = [each for each in share.receivers if job.nodes[each] != job.nodes[rank]]
            assert len(far) <= (num_nodes - 1).bit_length()
            assert share.receivers[: len(far)] == tuple(far), "what has farther to go leaves first"
            parents[rank, share.name, share.units] = (share.sender, share.name, share.units)
    for place in parents:
        hops, at = 0, place
        while (above := parents[at])[0] is not None:
            hops, at = hops + 1, above
        assert hops <= (num_nodes - 1).bit_length() + 1


def test_bytes_are_balanced_over_ranks():
    job = make_job([(1, 2)] * 4, range(8), layers=32)
    loads, sizes = Counter(), {kind.spec.name: kind.unit_bytes for kind in job.kinds}
    for run in distribute(job):
        loads[run.reader] += len(run.units) * sizes[run.name]
    assert max(loads.values()) < 1.15 * sum(loads.values()) / 8


def test_a_portion_is_cut_only_where_requests_stay_large():
    job = make_job([(1, 1)] * 4, range(4), scale=8)
    portion = portion_of("layers.0.up_proj.weight", job.config.num_layers)
    total = sum(kind.spec.shape[0] * kind.unit_bytes for kind in job.kinds
                if portion_of(kind.spec.name, job.config.num_layers) == portion)  # fmt: skip
    for request_bytes, expected in ((total, 1), (total // 2, 2), (1, 4)):
        runs = [run for run in distribute(job, None, request_bytes) if run.portion == portion]
        assert len({run.reader for run in runs}) == expected


@pytest.mark.parametrize("is_tied", [False, True])
def test_portions_are_in_the_order_in_which_they_are_used(is_tied):
    job = make_job([(2, 1)], [0], layers=3, is_tied=is_tied)
    first, last = (list(portions_of(job, distribute(job), rank)) for rank in (0, 1))
    assert list(first[0].needs) == ["embed_tokens.weight"] and len(first) == 5
    assert ("embed_tokens.weight" in last[0].needs) == is_tied
    assert list(last[-1].needs) == (["norm.weight"] if is_tied else ["norm.weight", "lm_head.weight"])
    assert {name.split(".")[2] for name in first[1].needs} >= {"input_layernorm", "q_proj", "o_proj", "k_norm"}
    assert {name.split(".")[2] for name in first[2].needs} >= {"post_attention_layernorm", "gate_proj", "down_proj"}


def test_ranks_that_share_a_kv_head_both_get_it():
    job = make_job([(1, 4)], [0], heads=(6, 2))
    name = "layers.0.k_proj.weight"
    spec = next(spec for spec, _ in job.kinds if spec.name == name)
    assert [needed_units(job.config, plan, spec) for plan in job.plans.values()] == [
        kv_heads(job.config, plan) for plan in job.plans.values()
    ]
    needers = {unit: run.needers for run in distribute(job) if run.name == name for unit in run.units}
    assert needers[0] == (0, 1) and needers[1][0] in (1, 2)
