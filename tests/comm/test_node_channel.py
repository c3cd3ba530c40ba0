"""Collectives in shared memory, between threads; between processes: test_node_mpi.py."""

import gc
import random
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from node_ranks import SMALL_SLOT, Sum, on_channel

from hpcinfer.comm.node.channel import slice_bounds
from hpcinfer.comm.node.library import compile_program, evaluate
from hpcinfer.comm.node.patience import is_crowded
from hpcinfer.errors import RankFailedError
from hpcinfer.partition.grains import Span
from hpcinfer.partition.tree_program import tree_program

COUNTS = (0, 1, 15, 1000, 3 * SMALL_SLOT // 4 + 5)
FORMS = ("one_shot", "two_shot")


def unaligned(count, dtype="f4"):
    """An array that stands at an odd address."""
    return np.frombuffer(bytearray(4 * count + 1), dtype, count, 1)


@pytest.mark.parametrize("size", range(1, 9))
def test_sum_is_the_same_bits_in_every_form(size):
    def work(channel):
        found = []
        for count in COUNTS:
            case = Sum(size, count)
            for form in FORMS:
                out = np.full(count, np.nan, "f4")
                channel.all_reduce(case.program, case.nodes[channel.rank], out, form=form)
                found.append(out.tobytes() == case.total.tobytes())
        return found

    assert all(map(all, on_channel(size, work)))


@pytest.mark.parametrize("form", FORMS)
def test_arrays_may_stand_anywhere_and_the_result_in_a_node(form):
    case = Sum(3, 9001)

    def work(channel):
        nodes = [unaligned(9001) for _ in case.nodes[channel.rank]]
        for node, value in zip(nodes, case.nodes[channel.rank], strict=True):
            node[:] = value
        out = unaligned(9001)
        channel.all_reduce(case.program, nodes, out, form=form)
        channel.all_reduce(case.program, nodes, nodes[-1], form=form)
        return out.tobytes() == nodes[-1].tobytes() == case.total.tobytes()

    assert all(on_channel(3, work))


def test_programs_of_a_channel_outlive_those_that_others_compile():
    case, compiled = Sum(2, 10), []

    def work(channel):
        out = np.empty(10, "f4")
        channel.all_reduce(case.program, case.nodes[channel.rank], out)
        channel.barrier()
        if channel.rank == 0:
            compiled.append(weakref.ref(compile_program(channel._library, case.program).held[0]))
            compile_program.cache_clear()
            gc.collect()
            assert compiled[0]() is not None
        channel.all_reduce(case.program, case.nodes[channel.rank], out)
        return out.tobytes() == case.total.tobytes()

    assert all(on_channel(2, work))
    gc.collect()
    assert compiled[0]() is None  # with the channels it goes


def test_tensors_and_arrays_of_more_dimensions_are_summed():
    case = Sum(2, 240)

    def work(channel):
        out = torch.empty(2, 120)
        nodes = [torch.from_numpy(node).view(2, 120) for node in case.nodes[channel.rank]]
        channel.all_reduce(case.program, nodes, out)
        return out.numpy().tobytes() == case.total.tobytes()

    assert all(on_channel(2, work))


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 8), count=st.integers(0, 20_000), seed=st.integers(0, 2**32), data=st.data())
def test_slices_of_whatever_bounds_make_the_sum(size, count, seed, data):
    case = Sum(size, count, seed=seed)
    inner = st.lists(st.integers(0, count), min_size=size - 1, max_size=size - 1)
    bounds = [0, *sorted(data.draw(inner)), count]

    def work(channel):
        part, out = np.empty(bounds[channel.rank + 1] - bounds[channel.rank], "f4"), np.empty(count, "f4")
        channel.reduce_scatter(case.program, case.nodes[channel.rank], part, bounds)
        channel.gather_slices(part, out, bounds)
        return out.tobytes() == case.total.tobytes()

    assert all(on_channel(size, work))


def test_ranks_that_hold_only_some_of_the_grains_get_the_nodes_they_make_together():
    spans = [[Span(1, 2), Span(2, 3)], [Span(3, 4), Span(4, 6)]]  # of 8 grains: [1, 2) [2, 4) [4, 6) come out
    program, values = tree_program(spans), [[1.0, 2.0], [3.0, 4.0]]
    bounds = [0, 700, 1000]

    def work(channel):
        nodes = [np.full(1000, value, "f4") for value in values[channel.rank]]
        outs = [np.empty(bounds[channel.rank + 1] - bounds[channel.rank], "f4") for _ in program.outputs]
        channel.reduce_slices(program, nodes, outs, bounds)
        return [set(out.tolist()) for out in outs]

    assert on_channel(2, work) == [[{1.0}, {5.0}, {4.0}]] * 2


@pytest.mark.parametrize("form", FORMS)
def test_data_in_a_room_are_summed_without_a_copy_and_mixed_with_others(form):
    cases = [Sum(4, count, seed=step) for step, count in enumerate([3000, 40_000, 3000, 1, 7000, 7000])]

    def work(channel):
        found = []
        for step, case in enumerate(cases):
            nodes = case.nodes[channel.rank]
            room = channel.room((len(nodes), len(case.total))) if (step + channel.rank) % 3 else None
            if room is not None:
                room[:] = nodes
                nodes = list(room)
            out = np.empty_like(case.total)
            channel.all_reduce(case.program, nodes, out, form=form)
            found.append((out.tobytes() == case.total.tobytes(), room is not None))
        return found

    found = on_channel(4, work, room_bytes=1 << 19)
    assert all(is_right for rank in found for is_right, _ in rank)
    assert sum(has_room for rank in found for _, has_room in rank) == 16


def test_rooms_are_two_in_turn_and_not_given_while_others_may_read():
    def work(channel):
        if channel.rank == 1:
            channel.barrier()
            time.sleep(0.1)
            out = np.empty(100, "f4")
            channel.broadcast(out, 0)
            return out.tolist()
        channel.barrier()
        first, second = channel.room((100,)), channel.room((10, 10))
        assert not np.shares_memory(first, second) and second.shape == (10, 10)
        first[:] = 1
        channel.broadcast(first, 0)
        is_given = channel.room((100,)) is not None  # the other may not have read it
        assert channel.room((100_000,)) is None and channel.room((0,)) is None
        return is_given

    assert on_channel(2, work, room_bytes=400) == [False, [1.0] * 100]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_everything_is_gathered_and_exchanged(size):
    counts = [0 if rank == 1 else 1 + 6000 * rank for rank in range(size)]
    table = [[(i * 1000 + j * 77) % 5001 for j in range(size)] for i in range(size)]

    def work(channel):
        rank = channel.rank
        gathered = np.empty(sum(counts), "f4")
        channel.all_gather(np.full(counts[rank], rank, "f4"), gathered, counts)
        sent = np.concatenate([np.full(table[rank][to], 10 * rank + to, "f4") for to in range(size)])
        exchanged = np.empty(sum(row[rank] for row in table), "f4")
        channel.all_to_all(sent, exchanged, table)
        for root in range(size):
            on_root = np.empty(sum(counts), "f4") if rank == root else None
            channel.gather(np.full(counts[rank], rank, "f4"), on_root, counts, root)
            assert on_root is None or on_root.tolist() == gathered.tolist()
        return gathered, exchanged, channel.all_gather_bytes(bytes(rank) + b"x" * 20_000 * (rank % 2))

    for rank, (gathered, exchanged, strings) in enumerate(on_channel(size, work)):
        assert gathered.tolist() == np.repeat(np.arange(size), counts).tolist()
        column = [row[rank] for row in table]
        assert exchanged.tolist() == np.repeat([10 * i + rank for i in range(size)], column).tolist()
        assert strings == [bytes(other) + b"x" * 20_000 * (other % 2) for other in range(size)]


def test_any_root_s_buffer_is_broadcast_whatever_its_type():
    def work(channel):
        found = []
        for root in range(channel.size):
            for count in (0, 3, 50_001):
                buffer = np.full(count, root if channel.rank == root else 99, np.uint8)
                channel.broadcast(buffer, root)
                found.append((buffer == root).all())
        return found

    assert all(map(all, on_channel(3, work)))


@pytest.mark.parametrize("seed", range(4))
def test_rounds_back_to_back_do_not_mix_however_late_a_rank_is(seed):
    """All operations in one random order, each rank with delays of its own."""
    size, steps = 4, 120
    script = random.Random(seed)
    plan = [(script.choice(["one_shot", "two_shot", "slices", "gather", "to_root", "broadcast", "barrier", "exchange"]),
             script.choice([1, 300, 5000])) for _ in range(steps)]
    cases = {count: Sum(size, count) for count in (1, 300, 5000)}

    def work(channel):
        delays, rank = random.Random(100 * seed + channel.rank), channel.rank
        for step, (name, count) in enumerate(plan):
            if delays.random() < 0.3:
                time.sleep(delays.choice([0, 1e-5, 2e-4, 1e-3]))
            case, out = cases[count], np.full(count, np.nan, "f4")
            if name in FORMS:
                channel.all_reduce(case.program, case.nodes[rank], out, form=name)
                assert out.tobytes() == case.total.tobytes(), f"{step = } {name = }"
            elif name == "slices":
                bounds = slice_bounds(count, size)
                part = np.empty(bounds[rank + 1] - bounds[rank], "f4")
                channel.reduce_scatter(case.program, case.nodes[rank], part, bounds)
                assert part.tobytes() == case.total[bounds[rank] : bounds[rank + 1]].tobytes(), f"{step = }"
            elif name == "gather":
                gathered = np.empty(size * count, "f4")
                channel.all_gather(np.full(count, step + rank, "f4"), gathered, [count] * size)
                assert (gathered.reshape(size, count) == step + np.arange(size)[:, None]).all(), f"{step = }"
            elif name == "to_root":
                gathered = np.full(size * count, -1, "f4") if rank == step % size else None
                channel.gather(np.full(count, step + rank, "f4"), gathered, [count] * size, step % size)
                is_right = gathered is None or (gathered.reshape(size, count) == step + np.arange(size)[:, None]).all()
                assert is_right, f"{step = }"
            elif name == "broadcast":
                buffer = np.full(count, step if rank == step % size else -1, "f4")
                channel.broadcast(buffer, step % size)
                assert (buffer == step).all(), f"{step = }"
            elif name == "barrier":
                channel.barrier()
            else:
                received = np.empty(size * count, "f4")
                channel.all_to_all(np.full(size * count, step + rank, "f4"), received, [[count] * size] * size)
                assert (received.reshape(size, count) == step + np.arange(size)[:, None]).all(), f"{step = }"

    on_channel(size, work)


def test_who_waits_looks_for_the_dead_and_the_channel_is_closed_then():
    def work(channel):
        if channel.rank == 1:
            return None
        looks = []

        def check():
            looks.append(time.monotonic())
            if len(looks) == 5:
                raise RankFailedError("rank 1 has died")

        channel._check = check
        with pytest.raises(RankFailedError, match="rank 1"):
            channel.barrier()
        for again in (channel.barrier, lambda: channel.send(b"", 1), lambda: channel.receive(bytearray(1), 1)):
            with pytest.raises(RankFailedError, match="closed"):
                again()
        return looks[-1] - looks[0]

    assert on_channel(2, work)[0] < 1


def test_crowded_is_more_ranks_than_cores():
    assert not is_crowded([{0}, {1}], 1)  # each on its own core
    assert is_crowded([{0}, {0}, {1, 2}], 1)  # two on one core
    assert not is_crowded([{0, 1}, {0, 1}], 1) and is_crowded([{0, 1}] * 3, 1)
    assert is_crowded([{0}], 10_000)  # other groups are on this node too


@given(count=st.integers(0, 5000), size=st.integers(1, 9))
def test_slices_cover_all_columns_by_cache_lines(count, size):
    bounds = slice_bounds(count, size)
    assert bounds[0] == 0 and bounds[-1] == count and bounds == sorted(bounds) and len(bounds) == size + 1
    assert all(bound % 16 == 0 or bound == count for bound in bounds)
    assert max(np.diff(bounds)) - min(np.diff(bounds)) <= 32


@pytest.mark.parametrize("has_library", [True, False])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_programs_run_on_arrays_of_one_process_with_or_without_the_library(monkeypatch, size, has_library):
    from hpcinfer.comm.node import library

    if not has_library:
        monkeypatch.setattr(library, "load", lambda: None)
    for count in (0, 1, 5000):
        case = Sum(size, count, grains=16)
        out = np.empty(count, "f4")
        evaluate(case.program, case.nodes, [out])
        assert out.tobytes() == case.total.tobytes()


def num_mapped():
    """Regions that this process has mapped."""
    return Path("/proc/self/maps").read_text().count("/hpcinfer-")


def test_a_closed_channel_gives_its_memory_back_at_once_but_for_rooms_that_are_used():
    def work(channel):
        room = channel.room((100,))
        sent = channel.send(bytes(3 << 20), 1 - channel.rank)
        channel.barrier()
        is_mapped = num_mapped() > before
        channel.barrier()
        channel.is_mpi_busy = channel.barrier  # a cycle
        channel.close()
        channel.close()
        room[:] = 1.0
        for again in (channel.barrier, sent.test, sent.wait, lambda: channel.room((100,))):
            with pytest.raises(RankFailedError, match="closed"):
                again()
        return channel, is_mapped, room.sum()

    gc.collect()
    before = num_mapped()
    gc.disable()
    try:
        channels, *facts = zip(*on_channel(2, work, room_bytes=400), strict=True)
        assert facts == [(True, True), (100.0, 100.0)] and len(channels) == 2
        assert num_mapped() == before
    finally:
        gc.enable()


class Asked:
    """The C library; notes for how long it was asked to wait."""

    def __init__(self, lib, slices_ns):
        self._lib, self._slices_ns = lib, slices_ns

    def __getattr__(self, name):
        function = getattr(self._lib, name)
        if name not in ("hpc_continue", "hpc_ring_wait"):
            return function
        return lambda *arguments: (self._slices_ns.append(arguments[-1]), function(*arguments))[1]


@pytest.mark.parametrize("wait_for", ["all", "message"])
@pytest.mark.parametrize("why", ["nothing", "mpi", "work", "mail"])
def test_who_waits_looks_often_while_messages_are_under_way(wait_for, why):
    def work(channel):
        if channel.rank == 1:
            while len(slices_ns) < 4:
                time.sleep(0.001)
            channel.send(b"now", 0, 1)
            channel.barrier()
            return
        channel._lib = channel._mail._lib = Asked(channel._lib, slices_ns)
        channel.is_mpi_busy = (lambda: True) if why == "mpi" else None
        channel.while_waiting = (lambda: True) if why == "work" else None
        if why == "mail":
            channel.send(bytes(3 << 20), 1, 2)
        if wait_for == "message":
            channel.receive(bytearray(3), 1, 1)
        channel.barrier()

    slices_ns = []
    on_channel(2, work)
    assert set(slices_ns[1:4]) == {2_000_000 if why == "nothing" else 100_000}
