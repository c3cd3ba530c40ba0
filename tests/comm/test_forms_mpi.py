"""Forms between processes, and what happens when one of them is killed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from grain_values import own_nodes, tree_sum, values_of
from jobs import fault_tolerance, start_mpi

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


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("kind", ["world", "tolerant"])
@pytest.mark.parametrize("nodes", [(0, 1, 2, 3), (0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 1)])
def test_processes_sum_to_the_same_bits_in_all_forms(world, kind, nodes):
    line = world.duplicate()
    line.locations = tuple(Location((node // 2,), node, 0) for node in nodes[: line.size])
    group = line if kind == "world" else TolerantGroup(line, range(line.size)[::-1], epoch=1)
    for form in forms_for(group.locations):
        reducer = TreeReducer(group, 8, lambda shape: np.empty(shape, np.float32), Selector(form))
        for length in (0, 1, 1000, 100_000):
            values = values_of(8, (length,), length)
            own, expected = own_nodes(values, reducer.run), tree_sum(values)
            assert all(reducer.reduce(own).tobytes() == expected for _ in range(3)), (form, length)


@pytest.mark.parametrize("form, length, deaths", [
    ("one_shot", 1000, ["1:20"]), ("two_shot", 100_000, ["3:0"]), ("leader", 1000, ["0:20"]),
    ("node_two_shot", 300_000, ["3:20", "1:30"]), ("node_one_shot", 100_000, ["2:7", "5:7"]),
    ("switch_two_shot", 100_000, ["4:20"]),
])
def test_a_death_is_seen_by_all_and_the_others_go_on_in_the_same_form(form, length, deaths):
    argv = [sys.executable, str(Path(__file__).with_name("dying_forms.py")), form, str(length), *deaths]
    run = start_mpi(6, argv, flags=fault_tolerance()).wait(60)
    assert run.rc == 0, run.stderr
    left = {found["rank"]: found for found in map(json.loads, run.stdout.splitlines())}
    dead = {int(death.split(":")[0]) for death in deaths}
    assert set(left) == set(range(6)) - dead
    for found in left.values():
        assert found["step"] == 40 and found["members"] == sorted(left)
        assert found["waited"] and max(found["waited"]) < SEEN_S
