import json
import os
import time

import pytest
from thread_group import run_ranks

from hpcinfer import __version__
from hpcinfer.comm import calibration, form_table
from hpcinfer.comm.calibration import calibrate, measure, measure_messages, measure_sums
from hpcinfer.comm.form_table import (
    describe_network,
    load_selector,
    machine_signature,
    parse_table,
    read_table,
    table_path,
    write_table,
)
from hpcinfer.comm.node.library import LAYOUT, load
from hpcinfer.comm.operations import Operations
from hpcinfer.comm.selector import OPERATIONS, Point, Selector
from hpcinfer.comm.serial import SerialGroup
from hpcinfer.partition.topology import Location

TABLE = {"2+2": {"all_reduce": {"leader": [Point(1024, 1e-5), Point(4096, 2e-5)]}}}


def one_curve(points):
    """A table as a file has it."""
    return f'{{"format": 2, "signature": "this machine", "shapes": {{"2": {{"send": {{"node": {points}}}}}}}}}'


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HPCINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(form_table, "machine_signature", lambda world: "this machine")
    return tmp_path / "cache"


def test_what_is_written_is_read_by_the_same_machine_alone():
    write_table("this machine", TABLE)
    assert read_table("this machine") == TABLE and read_table("that machine") == {}


def test_a_later_measurement_replaces_its_shapes_and_leaves_others():
    write_table("this machine", TABLE)
    write_table("this machine", {"4": {"send": {"node": [Point(1, 1.0)]}}})
    write_table("this machine", {"4": {"send": {"mpi": [Point(1, 2.0)]}}})
    assert read_table("this machine") == {**TABLE, "4": {"send": {"mpi": [Point(1, 2.0)]}}}


def test_the_folder_is_the_named_one_or_the_user_s(monkeypatch, cache, tmp_path):
    assert table_path("x").parent == cache
    monkeypatch.delenv("HPCINFER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert table_path("x").parent == tmp_path / "hpcinfer" and table_path("x") != table_path("y")


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", "7", '{"format": 2}', "[" * 100_000,
    '{"format": 2, "signature": "this machine", "shapes": 3}',
    '{"format": 2, "signature": "this machine", "shapes": {"2": {"leader": [[1, 1]]}}}',
    '{"format": 1, "signature": "this machine", "shapes": {}}',
    *map(one_curve, ["[[2, 1], [1, 1]]", "[[1, 0]]", "[[1, NaN]]", "[[1]]", "[[0, 1]]", "[[1e999, 1]]", "[[1e30, 1]]",
                     str([[size, 1] for size in range(1, 300)])]),
    one_curve("[[1, 1]]") + " " * (1 << 20),
])
def test_a_damaged_table_is_none(text, cache):
    cache.mkdir()
    table_path("this machine").write_text(text)
    assert read_table("this machine") == {}
    table_path("this machine").write_text(one_curve("[[1, 1]]"))
    assert read_table("this machine") == {"2": {"send": {"node": [Point(1, 1.0)]}}}


def test_an_unreadable_place_is_no_table(cache):
    table_path("this machine").mkdir(parents=True)
    assert read_table("this machine") == {}
    with pytest.raises(OSError):
        write_table("this machine", TABLE)
    assert os.listdir(cache) == [table_path("this machine").name]  # nothing half is left


def test_a_table_of_another_machine_is_none():
    content = {"format": 2, "signature": "that machine", "shapes": {}}
    assert parse_table(json.loads(json.dumps(content)), "this machine") == {}


def test_all_ranks_choose_by_what_the_root_has_read(monkeypatch):
    write_table("this machine", TABLE)
    reads = []
    monkeypatch.setattr(form_table, "read_table", lambda signature: reads.append(signature) or TABLE)
    assert run_ranks(3, load_selector) == [Selector("auto", TABLE)] * 3
    assert reads == ["this machine"]
    wanted = [Selector("leader", TABLE, "never")] * 3
    assert run_ranks(3, lambda group: load_selector(group, "leader", "never")) == wanted
    assert load_selector(SerialGroup()) == Selector()


def test_the_signature_says_processor_and_network_and_code(monkeypatch):
    monkeypatch.setattr(form_table, "describe_network", lambda: ["hsn0 200000"])
    signature = machine_signature(SerialGroup())
    assert "CPUs, hsn0 200000" in signature and signature == machine_signature(SerialGroup())
    assert signature.endswith(f"hpcinfer {__version__}, " + (f"node library {LAYOUT}" if load() else "no node library"))


def test_networks_are_told_by_interfaces_with_hardware_and_ports_of_the_fabric(tmp_path):
    def interface(name, state, speed=None, *, has_hardware=False):
        folder = tmp_path / "net" / name
        (folder / "device" if has_hardware else folder).mkdir(parents=True)
        (folder / "operstate").write_text(f"{state}\n")
        if speed is not None:
            (folder / "speed").write_text(f"{speed}\n")

    assert describe_network(tmp_path) == ["no network"]
    interface("lo", "unknown")
    interface("veth1", "up", 10_000)
    interface("tunnel", "unknown", -1)
    assert describe_network(tmp_path) == ["tunnel", "veth1 10000"]
    interface("hsn0", "up", 200_000, has_hardware=True)
    interface("eno1", "down", has_hardware=True)
    port = tmp_path / "infiniband" / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "rate").write_text("100 Gb/sec (4X EDR)\n")
    assert describe_network(tmp_path) == ["hsn0 200000", "mlx5_0 100 Gb/sec (4X EDR)"]


def test_measuring_gives_every_form_a_time_the_same_on_all_ranks():
    def work(group):
        group.locations = tuple(Location((), rank // 2, 0) for rank in range(4))
        return measure(group, 0.3, sizes=(64, 1024))

    first, *others = run_ranks(4, work)
    assert all(other == first for other in others)
    sums = first["all_reduce"]
    assert set(sums) == {"one_shot", "two_shot", "leader", "node_one_shot", "node_two_shot"}
    assert [point.num_bytes for point in sums["leader"]] == [64, 1024]
    assert set(first) == {"all_reduce", *(OPERATIONS if load() is not None else ())}
    assert all(set(first[name]) == {"node", "mpi"} for name in set(first) - {"all_reduce"})
    assert all(point.seconds > 0 for curves in first.values() for points in curves.values() for point in points)


def test_a_form_that_is_slow_for_few_bytes_is_measured_for_many_too(monkeypatch):
    slow = iter([{"one_shot": 1.0, "two_shot": 9.0}] * 2 + [{"one_shot": 9.0, "two_shot": 1.0}] + [{"two_shot": 1.0}])
    monkeypatch.setattr(calibration, "time_in_turn", lambda group, works, budget_s: next(slow))
    curves = run_ranks(1, lambda group: measure_sums(group, None, 1.0, (1 << 10, 1 << 14, 1 << 18, 1 << 20)))[0]
    assert {name: len(points) for name, points in curves.items()} == {"one_shot": 3, "two_shot": 4}


def test_calibration_covers_the_groups_of_all_even_meshes(monkeypatch):
    found = {"all_reduce": {"one_shot": [Point(64, 1.0), Point(128, 2.0)]}}
    slower = {"all_reduce": {"one_shot": [Point(64, 3.0)]}}
    monkeypatch.setattr(calibration, "measure", lambda group, budget_s: found if group.size > 2 else slower)

    def work(group):
        return calibrate(group, 1.0)

    first, *others = run_ranks(6, work)
    assert all(other == first for other in others)
    assert set(first) == {"2 anywhere", "3 anywhere", "6 anywhere"}
    assert first["2 anywhere"] == slower


def test_messages_are_measured_between_two_neighbours_by_each_way_in_turn():
    sent = {rank: [] for rank in range(5)}

    def work(group):
        group.locations = tuple(Location((), node, 0) for node in (0, 1, 1, 1, 2))

        class Slow(Operations):
            def send(self, buffer, peer, tag=0):
                sent[self.rank].append((self, peer))
                time.sleep(0.004)
                return super().send(buffer, peer, tag)

        ways = {"node": Slow(group), "mpi": Operations(group)}
        curves = measure_messages(group, ways, [64, 256], 0.0)
        assert all(operations is ways["node"] for operations, _ in sent[group.rank])
        return curves

    first, *others = run_ranks(5, work)
    assert all(other == first for other in others)
    assert [point.num_bytes for point in first["node"]] == [point.num_bytes for point in first["mpi"]] == [64, 256]
    assert all(slow.seconds > 0.003 for slow in first["node"])
    assert [[peer for _, peer in sent[rank]] for rank in range(5)] == [[], [2] * 40, [1] * 40, [], []]
