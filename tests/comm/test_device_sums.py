"""Sums of GPUs: every form has the bits of the tree, whatever moves the arrays; with MPI: test_device_mpi.py."""

import numpy as np
import pytest
from fake_gpu import FakeGpu
from gpu_threads import KINDS, group_of, on_gpus, part
from grain_values import own_nodes, tree_sum, values_of
from thread_group import run_ranks

from hpcinfer.comm import calibration
from hpcinfer.comm.device import calibration as of_gpus
from hpcinfer.comm.forms import forms_for
from hpcinfer.comm.selector import Point, Selector
from hpcinfer.comm.tree import TreeReducer
from hpcinfer.partition.topology import Location

PAIRS = tuple(Location((node // 2,), node, 0) for node in (0, 0, 1, 1))


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
    values = [values_of(8, shape, seed) for seed, shape in enumerate(shapes)]

    def work(group, gpu):
        group.group.locations = PAIRS[:size]
        reducer = reducer_of(group, gpu, Selector(form))
        assert reducer.is_recordable is (kind == "nccl") and not reducer.is_worth_halving(1 << 30, 1000)
        totals, before = [], None
        for each in values:
            room = reducer.room((len(reducer.spans), *each.shape[1:]))
            nodes = own_nodes(each, reducer.run)
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
        nodes = own_nodes(values, reducer.run)
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
    monkeypatch.setattr(of_gpus, "open_device_group", lambda group, arrays: group_of(kind, group, arrays))
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
