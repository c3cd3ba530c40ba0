"""Arrays of GPUs between ranks in threads, in each way that they may travel; with MPI: test_device_mpi.py."""

from operator import add
from queue import Empty
from threading import BrokenBarrierError

import numpy as np
import pytest
import thread_group
from fake_gpu import AwareGroup, FakeGpu, FakeNccl
from thread_group import run_ranks

from hpcinfer.comm import calibration
from hpcinfer.comm.device import calibration as of_gpus
from hpcinfer.comm.device.group import DeviceGroup
from hpcinfer.comm.device.nccl_group import NcclGroup
from hpcinfer.comm.device.staged_group import StagedGroup
from hpcinfer.comm.forms import forms_for
from hpcinfer.comm.selector import Point, Selector
from hpcinfer.comm.tree import TreeReducer
from hpcinfer.partition.grains import Span, grain_runs, subtrees, tree_reduce
from hpcinfer.partition.topology import Location
from hpcinfer.partition.tree_program import tree_program

KINDS = ("pinned", "direct", "nccl")
PAIRS = tuple(Location((node // 2,), node, 0) for node in (0, 0, 1, 1))


def group_of(kind, group, gpu=None) -> tuple[DeviceGroup, FakeGpu]:
    gpu = gpu or FakeGpu(f"GPU {group.rank}")
    staged = StagedGroup(AwareGroup(group), gpu, is_direct=True) if kind == "direct" else StagedGroup(group, gpu)
    if kind != "nccl":
        return staged, gpu
    communicator = FakeNccl(group).join(group.size, group.rank, b"the id")
    return NcclGroup(group, gpu, communicator, staged), gpu


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(thread_group, "_LIMIT_S", 5)


def on_gpus(kind, size, work):
    def main(group):
        opened, gpu = group_of(kind, group)
        return work(opened, gpu)

    results = run_ranks(size, main)
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors:  # that a message did not come says less than why it was not sent
        raise min(errors, key=lambda error: isinstance(error, Empty | BrokenBarrierError))
    return results


def part(rank, count, salt=0):
    return np.random.default_rng([rank, count, salt]).standard_normal(count).astype("f4")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [(5, 5, 5), (7, 0, 30_000)], ids=["even", "uneven"])
def test_gathers_concatenate(kind, counts):
    whole = np.concatenate([part(rank, count) for rank, count in enumerate(counts)])

    def work(group, gpu):
        mine = gpu.put(part(group.rank, counts[group.rank]))
        everywhere = gpu.empty(sum(counts))
        group.all_gather(mine, everywhere, counts)
        assert np.array_equal(gpu.get(everywhere), whole)
        for root in range(group.size):
            there = gpu.empty(sum(counts)) if group.rank == root else None
            group.gather(mine, there, counts, root)
            assert there is None or np.array_equal(gpu.get(there), whole)
        host = np.empty(sum(counts), np.float32)
        group.all_gather(part(group.rank, counts[group.rank]), host, counts)
        assert np.array_equal(host, whole)

    on_gpus(kind, 3, work)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broadcast_gives_all_the_root_s(kind):
    def work(group, gpu):
        for root in range(group.size):
            array = gpu.put(part(group.rank, 1000)).reshape(10, 100)
            group.broadcast(array, root)
            assert np.array_equal(gpu.get(array).ravel(), part(root, 1000))

    on_gpus(kind, 3, work)


@pytest.mark.parametrize("kind", KINDS)
def test_an_all_to_all_of_uneven_parts(kind):
    counts = [[3, 0, 5], [1, 2, 40_000], [0, 7, 1]]

    def work(group, gpu):
        rank, size = group.rank, group.size
        sent = np.concatenate([part(rank, counts[rank][peer], peer) for peer in range(size)])
        expected = np.concatenate([part(peer, counts[peer][rank], rank) for peer in range(size)])
        received = gpu.empty(len(expected))
        group.all_to_all(gpu.put(sent), received, counts)
        assert np.array_equal(gpu.get(received), expected)

    on_gpus(kind, 3, work)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reduce_scatter_adds_in_the_order_of_the_tree(kind):
    bounds = (0, 10, 10, 1000)
    values = grains_of((1000,))
    program = tree_program([subtrees(run) for run in grain_runs(8, 3)])

    def work(group, gpu):
        out = gpu.empty(bounds[group.rank + 1] - bounds[group.rank])
        nodes = [gpu.put(node) for node in own_nodes(values, subtrees(grain_runs(8, 3)[group.rank]))]
        group.reduce_scatter(program, nodes, out, bounds)
        return gpu.get(out).tobytes()

    assert b"".join(on_gpus(kind, 3, work)) == tree_sum(values)


@pytest.mark.parametrize("kind", KINDS)
def test_messages_of_both_kinds_of_memory_keep_their_order(kind):
    def work(group, gpu):
        after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        if kind == "nccl":  # on one stream a ring of single messages would wait for itself
            before = after = group.rank ^ 1
        sent = []
        for salt in range(3):
            array = gpu.put(part(group.rank, 100, salt))
            if kind != "nccl" or group.rank < after:
                sent += [group.send(array, after, 3), group.send(part(group.rank, 9, salt), after, 4)]
        if kind != "nccl" or group.rank > before:
            for salt in range(3):
                room, host = gpu.empty(100), np.empty(9, np.float32)
                if salt:
                    group.receive(room, before, 3)
                else:
                    group.wait_all([group.start_receive(room, before, 3)])
                group.receive(host, before, 4)
                assert np.array_equal(gpu.get(room), part(before, 100, salt)), salt
                assert np.array_equal(host, part(before, 9, salt))
        for each in sent:
            each.wait()
            assert each.test()
        return group.broadcast_bytes(b"bytes" if group.rank == 0 else None), group.all_gather_bytes(b"%d" % group.rank)

    assert on_gpus(kind, 4, work) == [(b"bytes", [b"0", b"1", b"2", b"3"])] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_prepared_exchange_moves_what_the_arrays_hold_then(kind):
    def work(group, gpu):
        peers = [peer for peer in range(group.size) if peer != group.rank]
        mine, theirs = gpu.empty(50), {peer: gpu.empty(50) for peer in peers}
        exchange = group.prepare_exchange([(mine, peer) for peer in peers], [(theirs[p], p) for p in peers], 2)
        for turn in range(3):
            gpu.copy(gpu.put(part(group.rank, 50, turn)), mine)
            exchange.start()
            exchange.finish()
            kept = {peer: gpu.empty(50) for peer in peers}
            for peer in peers:
                gpu.copy(theirs[peer], kept[peer])
            gpu.copy(gpu.empty(50), mine)
            for peer in peers:
                assert np.array_equal(gpu.get(kept[peer]), part(peer, 50, turn))

    on_gpus(kind, 3, work)


def test_pinned_memory_is_used_again_when_its_copies_are_done():
    def work(group, gpu):
        made = []
        pinned = gpu.pinned
        gpu.pinned = lambda num_bytes: made.append(num_bytes) or pinned(num_bytes)
        room = gpu.empty(30_000)
        for _ in range(20):
            group.all_gather(gpu.put(part(group.rank, 15_000)), room, [15_000] * 2)
            gpu.get(room)
        return made

    for made in on_gpus("pinned", 2, work):
        assert made == [1 << 16, 1 << 16]


# Sums.


def grains_of(shape, seed=0):
    random = np.random.default_rng(seed)
    exponents = random.integers(-6, 7, (8, *shape))
    return (random.standard_normal((8, *shape)) * 10.0**exponents).astype(np.float32)


def own_nodes(values, spans):
    leaves = {Span(grain, grain + 1): value for grain, value in enumerate(values)}
    return [tree_reduce(leaves, Span(*span), add) for span in spans]


def tree_sum(values):
    return own_nodes(values, [Span(0, 8)])[0].tobytes()


def reducer_of(group, gpu, selector, most_elements=5000, **options):
    def allocate(shape):
        return gpu.empty(int(np.prod(shape))).reshape(shape)

    return TreeReducer(group, 8, allocate, selector, arrays=gpu, most_elements=most_elements, **options)


def kept_on(gpu, array):
    kept = gpu.empty(array.numel())
    gpu.copy(array.view(-1), kept)
    return kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("form", forms_for(PAIRS))
def test_sums_of_gpus_have_the_bits_of_the_tree(kind, size, form):
    shapes = [(3, 5), (17, 100), (0, 4), (40, 100), (3, 5)]
    values = [grains_of(shape, seed) for seed, shape in enumerate(shapes)]

    def work(group, gpu):
        group.group.locations = PAIRS[:size]
        reducer = reducer_of(group, gpu, Selector(form))
        assert reducer.is_recordable is (kind == "nccl") and not reducer.is_worth_halving(1 << 30, 1000)
        totals, before = [], None
        for each in values:
            room = reducer.room((len(reducer.spans), *each.shape[1:]))
            first = reducer.run.start
            nodes = own_nodes(each, [Span(first + start, first + stop) for start, stop in reducer.spans])
            for node, place in zip(nodes, room, strict=True):
                gpu.copy(gpu.put(node), place)
            after = reducer.start(list(room))
            if before is not None:
                totals.append(kept_on(gpu, reducer.finish(before)))
            before = after
        totals.append(kept_on(gpu, reducer.finish(before)))
        assert reducer.traffic.calls == len(shapes)
        return [gpu.get(total).tobytes() for total in totals]

    assert on_gpus(kind, size, work) == [[tree_sum(each) for each in values]] * size


def test_a_sum_that_stands_in_its_room_is_not_copied_and_memory_stays_where_it_is():
    def work(group, gpu):
        reducer = reducer_of(group, gpu, Selector("one_shot"), most_elements=1000)
        longest = reducer.room((len(reducer.spans), 1000)).data_ptr()
        for length in (1, 999, 1000, 5):
            assert reducer.room((len(reducer.spans), length)).data_ptr() == longest
            reducer.reduce([gpu.put(part(0, length)) for _ in reducer.spans])
        return True

    assert on_gpus("nccl", 2, work) == [True, True]


def test_plans_that_a_graph_holds_are_kept():
    def work(group, gpu):
        reducer = reducer_of(group, gpu, Selector("two_shot"))
        [form] = {reducer._way((length,)).form for length in (100, 200)}
        gpu.is_recording_now = True
        recorded = form._plan_for(100, 0)
        gpu.is_recording_now = False
        for length in range(200, 300):
            form._plan_for(length, 0)
        assert len(form._plans) < 20
        return form._plan_for(100, 0) is recorded

    assert on_gpus("nccl", 2, work) == [True, True]


def test_sums_need_no_order_where_bits_may_differ():
    values = part(7, 8 * 100).reshape(8, 100)

    def work(group, gpu):
        reducer = reducer_of(group, gpu, Selector(), exact=False)
        assert reducer.form_for(1 << 20) == "nccl:library"
        nodes = own_nodes(values, [Span(*span) for span in subtrees(reducer.run)])
        return gpu.get(reducer.reduce([gpu.put(node) for node in nodes]))

    first, *others = on_gpus("nccl", 3, work)
    np.testing.assert_allclose(first, values.sum(0), rtol=1e-4, atol=1e-5)
    assert all(np.array_equal(first, other) for other in others)


def test_what_is_recorded_goes_through_nccl_whatever_was_measured():
    curves = {name: [(1, 1.0)] for name in ("nccl:one_shot", "nccl:two_shot", "mpi:two_shot")} | {
        "mpi:one_shot": [(1, 0.5)]}  # fmt: skip
    table = {"2 anywhere of GPUs": {"all_reduce": {name: [Point(*p) for p in c] for name, c in curves.items()}}}

    def work(group, gpu):
        reducer = reducer_of(group, gpu, Selector(table=table))
        nodes = [gpu.put(np.full(100, 1.0, np.float32)) for _ in reducer.spans]
        communicator = group._communicator
        reducer.reduce(nodes)
        before = communicator.num_groups
        gpu.is_recording_now = True
        total = reducer.reduce(nodes)
        gpu.is_recording_now = False
        return before, communicator.num_groups, gpu.get(total)[0]

    assert on_gpus("nccl", 2, work) == [(0, 1, 2.0)] * 2


@pytest.mark.parametrize("kind", ["pinned", "nccl"])
def test_calibration_measures_each_transport_and_form_until_the_gpu_is_done(kind, monkeypatch):
    monkeypatch.setattr(calibration, "SIZES", (1 << 10, 1 << 12))
    monkeypatch.setattr(of_gpus, "open_device_group", lambda group, arrays: group_of(kind, group, arrays)[0])
    slow_s = 0.005

    def work(group):
        gpu = FakeGpu(f"GPU {group.rank}")
        gpu.work_s = slow_s
        return calibration.calibrate(group, 0.2, gpu)

    first, second = run_ranks(2, work)
    assert first == second and set(first) == {"2 anywhere of GPUs"}
    curves = first["2 anywhere of GPUs"]["all_reduce"]
    mpi = {"mpi:one_shot", "mpi:two_shot"}
    assert set(curves) == (mpi if kind == "pinned" else mpi | {"nccl:one_shot", "nccl:two_shot", "nccl:library"})
    assert all(point.seconds > slow_s / 2 for points in curves.values() for point in points)


def test_a_reduced_sum_may_be_kept_and_one_that_was_started_stands_where_the_next_one_will():
    def work(group, gpu):
        reducer = reducer_of(group, gpu, Selector("two_shot"))
        first, second = ([gpu.put(np.full(40, value, np.float32)) for _ in reducer.spans] for value in (1.0, 5.0))
        kept = reducer.reduce(first)
        addresses = {reducer.finish(reducer.start(second)).data_ptr() for _ in range(3)}
        return len(addresses), gpu.get(kept).tolist()

    assert on_gpus("nccl", 2, work) == [(1, [2.0] * 40)] * 2
