from dataclasses import replace

import pytest
from made_up_ranks import cluster, levels, rank_facts

from hpcinfer.diagnosis.devices import Devices
from hpcinfer.diagnosis.finding import ERROR, OK, WARNING, fold
from hpcinfer.diagnosis.limits import check_limits
from hpcinfer.diagnosis.node import Limit, SharedMemory

MIB = 1 << 20


def limited(name, soft, hard=-1, size=1, **more):
    facts = rank_facts(world_size=size, **more)
    return check_limits([replace(facts, limits={**facts.limits, name: Limit(soft, hard)})])


def test_a_healthy_cluster_has_nothing_but_ok():
    assert set(levels(fold(check_limits(cluster(125, 8))))) == {OK}


@pytest.mark.parametrize(("name", "soft", "words"), [
    ("AS", 4 << 30, "4.0 GiB"), ("FSIZE", 1 << 30, "1.0 GiB"), ("CPU", 3600, "3600 s"), ("NPROC", 20, "20 processes"),
])  # fmt: skip
def test_limits_that_a_job_meets_are_warnings(name, soft, words):
    (finding,) = limited(name, soft)
    assert finding.level == WARNING and words in finding.found and "ulimit" in finding.hint


def test_open_files_are_compared_with_the_size_of_the_world():
    assert levels(limited("NOFILE", 1024, size=8)) == [OK]
    (finding,) = limited("NOFILE", 1024, 4096, size=1000)
    assert finding.level == WARNING and "ulimit -n 2256" in finding.hint
    (finding,) = limited("NOFILE", 1024, 1024, size=1000)
    assert "hard limit is 1024" in finding.hint
    assert levels(limited("NOFILE", 64)) == [ERROR]


def test_locked_memory_matters_only_with_a_fast_adapter():
    assert levels(limited("MEMLOCK", 64 << 10)) == [OK]
    (finding,) = limited("MEMLOCK", 64 << 10, devices=Devices(fabrics=("mlx5_0",)))
    assert finding.level == WARNING and "mlx5_0" in finding.found


def shared(free_bytes, *, alike=True):
    return cluster(2, 4, lambda fact: replace(
        fact, shared_memory=SharedMemory("/dev/shm", 1 if alike else fact.rank, free_bytes)))  # fmt: skip


def test_a_container_with_little_shared_memory_is_an_error_on_its_node():
    (finding,) = fold(check_limits(shared(64 * MIB))[1:])
    assert finding.level == ERROR and finding.ranks == tuple(range(8)) and "128.0 MiB for 4 ranks" in finding.found
    assert "--shm-size" in finding.hint
    assert set(levels(check_limits(shared(128 * MIB)))) == {OK}


def test_no_shared_memory_and_one_for_each_rank_are_warnings():
    for facts in (shared(-1), shared(1 << 40, alike=False)):
        assert levels(fold(check_limits(facts)), "shared memory") == [WARNING]


def test_one_rank_on_a_node_needs_no_shared_memory():
    assert levels(check_limits([rank_facts(shared_memory=SharedMemory("/dev/shm"))])) == [OK]
