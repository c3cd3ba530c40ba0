from types import SimpleNamespace

import pytest
from models import make_tiny_model
from thread_group import run_ranks

from hpcinfer.comm.launcher import Launch
from hpcinfer.comm.node.library import load
from hpcinfer.comm.serial import SerialGroup
from hpcinfer.config import EngineOptions
from hpcinfer.engine import kv_memory
from hpcinfer.engine.options import ReplicaOptions, check_engine_options
from hpcinfer.engine.replica import build_replica
from hpcinfer.errors import ConfigError, RankFailedError
from hpcinfer.kernels import create_kernels
from hpcinfer.partition.mesh import Mesh
from hpcinfer.partition.topology import Location
from hpcinfer.weights.conversion import convert
from hpcinfer.weights.reader import Store


@pytest.mark.parametrize("options", [
    {"max_num_seqs": 0}, {"max_num_batched_tokens": -1}, {"block_size": 0}, {"kv_cache_memory": "much"},
])  # fmt: skip
def test_engine_options_out_of_range_are_refused_by_name(options):
    [(name, value)] = options.items()
    words = "much" if value == "much" else f"--{name.replace('_', '-')} {value}"
    with pytest.raises(ConfigError, match=words):
        check_engine_options(EngineOptions(**options))


def test_default_engine_options_are_accepted():
    check_engine_options(EngineOptions())


def test_cache_beyond_the_memory_is_refused_with_its_size(tmp_path, monkeypatch):
    convert(make_tiny_model(tmp_path / "model", "llama"), tmp_path / "store", SerialGroup())
    kernels = create_kernels("reference")

    def kv_cache(*sizes):
        raise MemoryError

    monkeypatch.setattr(kernels, "kv_cache", kv_cache)
    options = ReplicaOptions(EngineOptions(kv_cache_memory="2MiB"), "float32", 64, seed=0)
    with pytest.raises(ConfigError, match=r"KV cache of 2\.0 MiB per rank") as caught:
        build_replica(SerialGroup(), Mesh(1, 1, 1), Store.open(tmp_path / "store"), kernels, options)
    assert "--kv-cache-memory" in str(caught.value)


ON_THE_NODE = SimpleNamespace(free_bytes=lambda: None)  # kernels whose arrays are in the node's memory


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_of_a_node_count_the_same_memory_as_free_whoever_looks_first(monkeypatch, first):
    """Three ranks of two nodes, four on each in all; weights come to them one after another."""
    looks, to_come = [], [300, 100, 700]

    def work(group):
        group.locations = tuple(Location((), node, 0) for node in (0, 0, 1))
        while group.rank == 1 - first and first not in looks:
            continue  # the other one of the node looks before this one
        looks.append(group.rank)
        return kv_memory.free_memory(group, ON_THE_NODE, to_come[group.rank])

    available = iter([4100, 4000, 4000])  # what is taken meanwhile is taken from all
    memory = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=next(available)))
    monkeypatch.setattr(kv_memory, "psutil", memory)
    monkeypatch.setattr(kv_memory, "read_launch", lambda environment: Launch("mpirun", 0, 8, 4))
    near, also_near, far = run_ranks(3, work)
    assert near == also_near == 4000 // 4 - 200  # at least one of the two has seen the less
    assert far in (4000 // 4 - 700, 4100 // 4 - 700)


def test_weights_that_need_more_than_there_is_leave_nothing(monkeypatch):
    memory = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(kv_memory, "psutil", memory)
    assert kv_memory.free_memory(SerialGroup(), ON_THE_NODE, 2000) == 0


def test_memory_of_a_device_is_what_counts_where_arrays_are_there():
    on_device = SimpleNamespace(free_bytes=lambda: 5000)
    assert kv_memory.free_memory(SerialGroup(), on_device, 2000) == 3000
    assert kv_memory.free_memory(SerialGroup(), on_device, 6000) == 0


def test_a_replica_looks_after_the_mpi_while_it_waits_in_memory_and_gives_the_memory_back(tmp_path):
    if load() is None:
        pytest.skip("the node library was not built")
    convert(make_tiny_model(tmp_path / "model", "llama"), tmp_path / "store", SerialGroup())
    options = ReplicaOptions(EngineOptions(kv_cache_memory="2MiB"), "float32", 64, seed=0)

    def work(group):
        stage = group.split(group.rank // 2, group.rank)
        group.locations, stage.locations = (Location((), 0, 0),) * 4, (Location((), 0, 0),) * 2
        group.split = lambda color, key: stage
        store, kernels = Store.open(tmp_path / "store"), create_kernels("reference")
        replica = build_replica(group, Mesh(1, 2, 2), store, kernels, options)
        channels = [each.channel for each in (replica.groups.stage, replica.groups.replica)]
        assert channels[0] is replica.runner.stage.reducer.channel is not channels[1]
        assert all(each.is_mpi_busy == replica.runner.pipeline.is_busy for each in channels)
        channels[1].barrier()
        replica.close()
        for each in channels:
            with pytest.raises(RankFailedError, match="closed"):
                each.barrier()

    assert run_ranks(4, work) == [None] * 4
