"""Ranks read a store together and pass on what they have read; whoever is dead or silent is done without."""

import shutil
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from models import make_tiny_model
from thread_group import ThreadGroup, run_ranks

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.errors import HpcInferError, RankFailedError, RevokedError, StoreError
from hpcinfer.model import delivery, transit
from hpcinfer.model.common import has_commons, open_commons
from hpcinfer.model.delivery import Delivery
from hpcinfer.model.distribution import distribute, job_of, needed_units
from hpcinfer.model.portions import portions_of
from hpcinfer.model.shard import shard_plan
from hpcinfer.partition.layout import Layout, ReplicaLayout
from hpcinfer.partition.mesh import Mesh
from hpcinfer.weights.conversion import convert
from hpcinfer.weights.reader import Store

LIMIT_S = 20
REQUEST_BYTES = 1000  # so that every rank reads something of every portion


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("delivery")
    model = make_tiny_model(folder / "model", "qwen2", dtype="bfloat16", num_hidden_layers=4)
    convert(model, folder / "store", SerialGroup())
    return folder / "store"


def layout_of(*meshes):
    """Replicas (pp, tp) of consecutive ranks."""
    replicas, first = [], 0
    for pp, tp in meshes:
        replicas.append(ReplicaLayout(Mesh(1, pp, tp), tuple(range(first, first + pp * tp))))
        first += pp * tp
    return Layout(tuple(replicas), ())


def plans_of(store, layout):
    return {rank: shard_plan(store.config, store.grains, mesh, mesh.coord(place))
            for mesh, members in layout.replicas for place, rank in enumerate(members)}  # fmt: skip


def make_delivery(store, layout, group, nodes=None, *, has_one_table=False):
    job, arrays = job_of(store, plans_of(store, layout), nodes or [0] * group.size), {}
    if has_one_table and has_commons(store, job):
        commons = open_commons(store, job, group)
        job, arrays = replace(job, common=commons.names), commons.arrays
    return Delivery(store, portions_of(job, distribute(job, None, REQUEST_BYTES), group.rank), group, arrays)


def take_all(delivery, first=0):
    """Everything from a portion on, in order: values by name."""
    return {name: delivery.read(name).values for portion in delivery.portions[first:] for name in portion.needs}


def assert_right(path, layout, rank, found):
    with Store.open(path) as store:
        plan = plans_of(store, layout)[rank]
        needs = {name: needed_units(store.config, plan, store.spec(name)) for name in store.parameters}
        assert {name for name, units in needs.items() if units} <= set(found)
        for name, values in found.items():
            assert np.array_equal(values, store.read(name, needs[name]).values), name


def load(path, layout, group, nodes=None):
    """Units that this rank has read, and what it has exchanged."""
    with Store.open(path) as store:
        units, read_into = list[tuple[str, int]](), store.read_into

        def note(wanted, **options):
            units.extend(each[:2] for each in wanted)
            read_into(wanted, **options)

        store.read_into = note
        one = make_delivery(store, layout, group, nodes)
        one.start()
        found = take_all(one)
        one.wait()
        assert_right(path, layout, group.rank, found)
        assert one.moved.bytes_read == store.bytes_read
        return units, one.moved


def all_units(path):
    with Store.open(path) as store:
        return sorted((name, unit) for name in store.parameters for unit in range(store.spec(name).shape[0]))


@pytest.mark.parametrize("meshes", [[(1, 1)], [(1, 3)], [(2, 1)], [(1, 1)] * 4, [(1, 2)] * 2, [(2, 2), (1, 1)]])
@pytest.mark.parametrize("nodes", [[0] * 5, [0, 0, 1, 1, 2]])
def test_each_byte_is_read_once_and_comes_to_all_that_need_it(path, meshes, nodes):
    layout = layout_of(*meshes)
    size = sum(len(replica.members) for replica in layout.replicas)
    results = run_ranks(size, lambda group: load(path, layout, group, nodes))
    assert not [result for result in results if isinstance(result, BaseException)], results
    assert sorted(unit for units, _ in results for unit in units) == all_units(path)
    traffics = [traffic for _, traffic in results]
    assert sum(each.bytes_sent for each in traffics) == sum(each.bytes_received for each in traffics)
    assert (sum(each.bytes_sent for each in traffics) > 0) == (meshes not in ([(1, 1)], [(2, 1)]))
    assert all(each.last_byte_s > 0 for each in traffics)


@pytest.mark.parametrize(("meshes", "nodes"), [
    ([(1, 1)] * 4, [0, 0, 1, 1]), ([(1, 2)] * 3, [0] * 6), ([(2, 1)] * 2, [0, 1, 0, 1]), ([(1, 1), (1, 2)], [0, 0, 0]),
])  # fmt: skip
def test_table_is_in_memory_once_for_ranks_of_a_node_that_hold_the_same(path, meshes, nodes):
    layout = layout_of(*meshes)

    def load_table(group: ThreadGroup):
        with Store.open(path) as store:
            one = make_delivery(store, layout, group, nodes, has_one_table=True)
            one.start()
            found = take_all(one)
            one.wait()
            assert_right(path, layout, group.rank, found)
            table = found.get("embed_tokens.weight")
            group.barrier()
            if table is not None:
                for unit in table:
                    unit.reshape(-1)[group.rank] += 1  # in the element of this rank
            group.barrier()
            plan, units = plans_of(store, layout)[group.rank], None
            if table is not None:
                units = needed_units(store.config, plan, store.spec("embed_tokens.weight"))
                first = store.read("embed_tokens.weight", units).values
                changed = np.flatnonzero((table != first).reshape(len(table), -1)[0]).tolist()
                return nodes[group.rank], units, changed, one.moved.bytes_received
            return None

    results = run_ranks(len(nodes), load_table)
    assert not [result for result in results if isinstance(result, BaseException)], results
    for found in filter(None, results):
        mates = [rank for rank, other in enumerate(results) if other is not None and other[:2] == found[:2]]
        assert found[2] == mates
    assert any(len(found[2]) > 1 for found in filter(None, results)) == (meshes != [(1, 1), (1, 2)])


class Lonely:
    """A group whose other ranks send nothing: they are silent, or dead, or have left."""

    rank, size, locations = 0, 2, None

    def __init__(self, error=None, *, at_once=False):
        self.error, self.at_once, self.num_sent, self.num_cancelled = error, at_once, 0, 0

    def start_receive(self, buffer, peer, tag):
        if self.at_once:
            raise self.error
        return self

    def test(self):
        if self.error is not None:
            raise self.error
        return False

    def cancel(self):
        self.num_cancelled += 1

    def send(self, buffer, peer, tag):
        self.num_sent += 1
        return SerialGroup().send_bytes(b"", 0)


@pytest.mark.parametrize("group", [
    Lonely(), Lonely(RankFailedError("dead")), Lonely(RankFailedError("dead"), at_once=True),
], ids=["silent", "dead", "dead before"])  # fmt: skip
def test_what_does_not_come_is_read_from_the_store(path, group, monkeypatch):
    monkeypatch.setattr(transit, "PATIENCE_S", 0.05)
    start = time.monotonic()
    units, traffic = load(path, layout_of((1, 1), (1, 1)), group)
    assert sorted(units) == all_units(path) and traffic.bytes_received == 0 < traffic.bytes_sent
    assert group.num_sent > 0 and time.monotonic() - start < LIMIT_S


def test_who_is_not_wanted_any_more_stops(path):
    with Store.open(path) as store:
        one = make_delivery(store, layout_of((1, 1), (1, 1)), Lonely(RevokedError("over")))
        one.start()
        with pytest.raises(RevokedError):
            take_all(one)
        one.wait()


def test_who_wants_nothing_any_more_still_serves_the_others(path):
    layout = layout_of((1, 1), (1, 1))

    def serve(group):
        if group.rank == 0:
            return load(path, layout, group)
        with Store.open(path) as store:
            one = make_delivery(store, layout, group)
            one.start()
            one.pass_on()
            one.wait()
            with pytest.raises(HpcInferError, match="not wanted"):
                take_all(one)
            return None, one.moved

    (units, got), (_, given) = run_ranks(2, serve)
    assert 0 < got.bytes_received == given.bytes_sent and len(units) < len(all_units(path))


def test_who_stops_waits_for_nobody(path):
    with Store.open(path) as store:
        one = make_delivery(store, layout_of((1, 1), (1, 1)), group := Lonely())
        one.start()
        one.read(next(iter(one.portions[0].needs)))
        start = time.monotonic()
        one.stop()
        assert time.monotonic() - start < 5 < transit.PATIENCE_S and one.is_over and group.num_cancelled > 0
        with pytest.raises(HpcInferError, match="stopped"):
            take_all(one, first=1)


def test_damage_is_told_to_who_reads(path, tmp_path):
    copy = shutil.copytree(path, tmp_path / "store")
    file = sorted(copy.glob("layer*"))[2]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with Store.open(copy) as store:
        one = make_delivery(store, layout_of((1, 1)), SerialGroup())
        one.start()
        assert one.read("embed_tokens.weight").values.any()
        with pytest.raises(StoreError, match="checksum") as caught:
            take_all(one, first=1)
        one.wait()
        assert file.name in str(caught.value)


def test_no_more_is_read_ahead_than_there_is_room_for(path, monkeypatch):
    monkeypatch.setattr(delivery, "LEAST_AHEAD", 1)
    monkeypatch.setattr(delivery, "MOST_AHEAD", 1)
    with Store.open(path) as store:
        one = make_delivery(store, layout_of((1, 1)), SerialGroup())
        one.start()
        time.sleep(0.5)
        first = store.bytes_read
        time.sleep(0.3)
        most = max(_num_bytes(store, portion) for portion in one.portions)
        assert first == store.bytes_read < 4 * most < sum(_num_bytes(store, each) for each in one.portions)
        assert_right(path, layout_of((1, 1)), 0, take_all(one))
        one.wait()


def _num_bytes(store, portion):
    return sum(len(units) * store.empty(name, 1).nbytes for name, units in portion.needs.items())


def test_what_comes_from_others_is_staged_too(path, tmp_path):
    layout = layout_of((1, 1), (1, 1))

    def stage(group: ThreadGroup):
        with Store.open(path, stage=str(tmp_path / f"node{group.rank}")) as store:
            one = make_delivery(store, layout, group)
            one.start()
            take_all(one)
            one.wait()
            store.flush_stage()
            return all(store.has_staged(name, unit) for name in store.parameters
                       for unit in range(store.spec(name).shape[0]))  # fmt: skip

    assert run_ranks(2, stage) == [True, True]


def test_no_thread_is_left(path):
    with Store.open(path) as store:
        before = set(threading.enumerate())
        one = make_delivery(store, layout_of((1, 1)), SerialGroup())
        one.start()
        take_all(one)
        one.wait()
        assert not [each.name for each in set(threading.enumerate()) - before if "weights" in each.name]


def test_what_fails_is_told_though_it_cannot_be_cleared_up_and_nothing_is_left_to_do(path, monkeypatch):
    def fail(*_):
        raise OSError("flipped")

    with Store.open(path) as store:
        one = make_delivery(store, layout_of((1, 1)), SerialGroup())
        monkeypatch.setattr(one, "_move", fail)
        monkeypatch.setattr(delivery.Way, "give_up", fail)
        assert not one.turn() and one.is_over
        with pytest.raises(OSError, match="flipped"):
            one.read("embed_tokens.weight")


def test_an_interrupted_turn_ends_loading_and_interrupts(path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with Store.open(path) as store:
        one = make_delivery(store, layout_of((1, 1)), SerialGroup())
        monkeypatch.setattr(one, "_move", interrupt)
        with pytest.raises(KeyboardInterrupt):
            one.turn()
        assert one.is_over and not one.turn()
