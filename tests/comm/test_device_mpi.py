"""Arrays of GPUs between processes, and what happens when one of them is killed; in threads: test_device_groups.py."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_gpu import AwareGroup, FakeGpu, FakeNccl
from grain_values import own_nodes, tree_sum, values_of
from jobs import fault_tolerance, start_mpi

from hpcinfer.comm.device.awareness import takes_device_memory
from hpcinfer.comm.device.nccl_group import NcclGroup
from hpcinfer.comm.device.opening import open_device_group
from hpcinfer.comm.device.staged_group import StagedGroup
from hpcinfer.comm.forms import forms_for
from hpcinfer.comm.selector import Selector
from hpcinfer.comm.tolerant import TolerantGroup
from hpcinfer.comm.tree import TreeReducer
from hpcinfer.comm.world import start_world
from hpcinfer.partition.topology import Location

SEEN_S = 5.0  # a death is seen sooner, on a busy machine too


@pytest.fixture(scope="module")
def world():
    return start_world()


def groups_of(world):
    line = world.duplicate()
    line.locations = tuple(Location((), rank // 2, 0) for rank in range(line.size))
    return {"world": line, "tolerant": TolerantGroup(line, range(line.size)[::-1], epoch=1)}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("kind", ["pinned", "direct", "nccl"])
@pytest.mark.parametrize("below", ["world", "tolerant"])
def test_processes_with_gpus_sum_to_the_same_bits_in_all_forms(world, kind, below):
    group = groups_of(world)[below]
    gpu = FakeGpu(f"GPU {group.rank}")
    if kind == "direct":
        opened = StagedGroup(AwareGroup(group), gpu, is_direct=True)
    else:
        wire = FakeNccl(world.duplicate().split(0, group.rank))
        opened = open_device_group(group, gpu, lambda: wire if kind == "nccl" else None)
    assert isinstance(opened, NcclGroup) is (kind == "nccl")

    def allocate(shape):
        return gpu.empty(int(np.prod(shape))).reshape(shape)

    for form in forms_for(group.locations):
        reducer = TreeReducer(opened, 8, allocate, Selector(form), arrays=gpu, most_elements=20_000)
        for length in (0, 1, 20_000):
            values = values_of(8, (length,), length)
            own, expected = own_nodes(values, reducer.run), tree_sum(values)
            nodes = [gpu.put(node) for node in own]
            assert all(gpu.get(reducer.reduce(nodes)).tobytes() == expected for _ in range(2)), (form, length)


@pytest.mark.mpi(min_size=2)
def test_hidden_states_go_down_the_stages(world):
    gpu = FakeGpu(f"GPU {world.rank}")
    wire = FakeNccl(world.duplicate())
    for find in (lambda: None, lambda: wire):
        opened, sent = open_device_group(world, gpu, find), []
        for batch in range(5):
            hidden = gpu.put(np.full((batch + 1, 7), batch, np.float32))
            if world.rank > 0:
                opened.receive(hidden := gpu.empty(7 * (batch + 1)), world.rank - 1, 11)
            if world.rank < world.size - 1:
                sent.append(opened.send(hidden, world.rank + 1, 11))
            else:
                assert (gpu.get(hidden) == batch).all()
        for each in sent:
            each.wait()
        world.barrier()


@pytest.mark.mpi(min_size=2)
def test_an_mpi_is_asked_and_tried(world):
    assert takes_device_memory(AwareGroup(world), FakeGpu("a"), lambda: True)
    assert not takes_device_memory(AwareGroup(world, lies=world.rank == 1), FakeGpu("a"), lambda: True)
    assert not takes_device_memory(AwareGroup(world), FakeGpu("a"), lambda: world.rank == 0)


@pytest.mark.parametrize("kind, form", [("nccl", "one_shot"), ("nccl", "two_shot"), ("pinned", "two_shot")])
def test_a_death_is_seen_by_all_and_the_others_go_on_with_a_new_group(kind, form):
    argv = [sys.executable, str(Path(__file__).with_name("dying_gpus.py")), kind, form, "2:20", "0:30"]
    run = start_mpi(4, argv, flags=fault_tolerance()).wait(60)
    assert run.rc == 0, run.stderr
    left = {found["rank"]: found for found in map(json.loads, run.stdout.splitlines())}
    assert set(left) == {1, 3}
    for found in left.values():
        assert found["step"] == 40 and found["members"] == [1, 3] and len(found["waited"]) == 2
        assert max(found["waited"]) < SEEN_S
        assert found["aborts"] == ([1, 1, 0] if kind == "nccl" else [])
