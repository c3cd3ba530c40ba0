"""All forms give the same bits; over MPI: test_mpi.py, with deaths: test_forms_mpi.py."""

import numpy as np
import pytest
from grain_values import own_nodes, tree_sum, values_of
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_group import run_ranks

from hpcinfer.comm import tree as tree_module
from hpcinfer.comm.exchange import RepeatedMessages
from hpcinfer.comm.forms import FORMS, forms_for
from hpcinfer.comm.node.library import load
from hpcinfer.comm.selector import Selector
from hpcinfer.comm.serial import SerialGroup
from hpcinfer.comm.tree import TreeReducer
from hpcinfer.config import EngineOptions
from hpcinfer.partition.topology import Location

needs_library = pytest.mark.skipif(load() is None, reason="the node library was not built")
PAIRS = tuple(Location((node // 2,), node, 0) for node in (0, 0, 1, 1, 2, 2, 3, 3))
HERE = (Location((), 0, 0),) * 4


def empty(shape):
    return np.empty(shape, np.float32)


def reducer_on(group, locations, grains, form):
    group.locations = locations
    return TreeReducer(group, grains, empty, Selector(form))


def sums(locations, size, values, form, times=1):
    """Bits of each rank's sum, several times."""

    def work(group):
        reducer = reducer_on(group, locations, len(values), form)
        nodes = own_nodes(values, reducer.run)
        return [reducer.reduce(nodes).tobytes() for _ in range(times)]

    return run_ranks(size, work)


@st.composite
def scenes(draw):
    grains = draw(st.sampled_from([4, 8, 16]))
    size = draw(st.integers(2, min(grains, 9)))
    nodes = draw(st.lists(st.integers(0, size - 1), min_size=size, max_size=size))
    nodes = sorted(nodes) if draw(st.booleans()) else nodes
    switches = draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    length = draw(st.sampled_from([0, 1, 15, 16, 17, 100, 1001, 20_000]))
    return grains, tuple(Location((switches[node],), node, 0) for node in nodes), length


@settings(max_examples=40, deadline=None)
@given(scene=scenes())
def test_all_forms_give_the_bits_of_the_tree_wherever_ranks_are(scene):
    grains, locations, length = scene
    values = values_of(grains, (length,), seed=length)
    for form in forms_for(locations):
        assert sums(locations, len(locations), values, form, times=2) == [[tree_sum(values)] * 2] * len(locations)


@settings(max_examples=15, deadline=None)
@given(scene=scenes())
def test_without_shared_memory_messages_give_the_same_bits(scene):
    grains, locations, length = scene
    values = values_of(grains, (length,), seed=length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_module, "open_channel", lambda group, room_bytes: None)
        for form in forms_for(locations):
            assert sums(locations, len(locations), values, form) == [[tree_sum(values)]] * len(locations)


@pytest.mark.parametrize("form", forms_for(PAIRS))
def test_a_reducer_takes_sums_of_any_shape_after_one_another(form):
    shapes = [(3, 5), (0, 4), (1,), (2, 3, 40), (3, 5), (17, 100)]

    def work(group):
        reducer = reducer_on(group, PAIRS, 8, form)
        results = [reducer.reduce(own_nodes(values_of(8, shape), reducer.run)) for shape in shapes]
        assert [result.shape for result in results] == shapes
        return [result.tobytes() for result in results], reducer.traffic

    for bits, traffic in run_ranks(8, work):
        assert bits == [tree_sum(values_of(8, shape)) for shape in shapes]
        assert traffic.calls == len(shapes) and traffic.seconds > 0
        assert traffic.num_bytes == 4 * sum(int(np.prod(shape)) for shape in shapes)


@pytest.mark.parametrize("form", forms_for(PAIRS))
def test_a_sum_may_begin_before_the_one_before_it_has_ended(form):
    shapes = [(40, 33), (3, 5), (17, 100), (40, 33), (0, 4), (200, 100), (3, 5)]
    values = [values_of(8, shape, seed=i) for i, shape in enumerate(shapes)]

    def work(group):
        reducer, totals = reducer_on(group, PAIRS, 8, form), []
        before = None
        for each in values:
            nodes = [node.copy() for node in own_nodes(each, reducer.run)]
            after = reducer.start(nodes)
            for node in nodes:
                node[:] = np.nan  # it has been read
            if before is not None:
                totals.append(reducer.finish(before).tobytes())
            before = after
        return [*totals, reducer.finish(before).tobytes()]

    assert run_ranks(8, work) == [[tree_sum(each) for each in values]] * 8


def test_receives_of_sums_that_nobody_ends_are_cancelled():
    class Coming:
        def __init__(self):
            self.is_cancelled = False

        def cancel(self):
            self.is_cancelled = True

    class Lonely(SerialGroup):
        size, locations = 3, None

        def __init__(self):
            self.coming = []

        def start_receive(self, buffer, peer, tag=0):
            self.coming.append(Coming())
            return self.coming[-1]

        def send(self, buffer, peer, tag=0):
            return Coming()

        def prepare_exchange(self, outgoing, incoming, tag):
            return RepeatedMessages(self, outgoing, incoming, tag)

    group = Lonely()
    reducer = TreeReducer(group, 8, empty, Selector("two_shot"))
    nodes = own_nodes(values_of(8, (20, 100)), reducer.run)
    reducer.start(nodes), reducer.start(nodes)
    with pytest.raises(AssertionError, match="two sums are under way"):
        reducer.start(nodes)
    reducer.close()
    assert len(group.coming) >= 4 and all(each.is_cancelled for each in group.coming)


def sends_of(form, locations=PAIRS, length=4096):
    """Floats that each rank sends to other nodes, and to its own."""

    def work(group):
        sent = {True: 0, False: 0}
        send = group.send

        def count(buffer, peer, tag=0):
            sent[locations[peer].node == locations[group.rank].node] += len(buffer)
            return send(buffer, peer, tag)

        group.send = count
        reducer = reducer_on(group, locations, 8, form)
        reducer.reduce(own_nodes(values_of(8, (length,)), reducer.run))
        return sent[False], sent[True]

    return run_ranks(len(locations), work)


@pytest.mark.parametrize("form, floats", [
    ("one_shot", 2 * 6 * 4096), ("two_shot", 2 * 2 * 6 * 512), ("leader", 3 * 4096), ("node_one_shot", 3 * 4096),
    ("node_two_shot", 2 * 3 * 1024), ("switch_one_shot", 6 * 1024), ("switch_two_shot", 6 * 1024),
])
def test_bytes_that_leave_a_node_are_those_of_the_form(form, floats):
    sent = sends_of(form)
    for node in range(4):
        assert sent[2 * node][0] + sent[2 * node + 1][0] == floats


@pytest.mark.parametrize("form", ["node_one_shot", "node_two_shot", "switch_two_shot"])
def test_all_ranks_of_a_node_use_the_network_alike_and_one_leader_alone(form):
    assert len({far for far, _ in sends_of(form)}) == 1
    assert [far > 0 for far, _ in sends_of("leader")] == [True, False] * 4


@needs_library
def test_shared_memory_leaves_nothing_to_send_inside_a_node():
    for form in ("node_one_shot", "node_two_shot", "leader"):
        assert {near for _, near in sends_of(form)} == {0}
    assert set(sends_of("one_shot", HERE)) == set(sends_of("two_shot", HERE)) == {(0, 0)}


def test_forms_that_differ_on_a_group_are_those_of_its_levels():
    assert forms_for(None) == forms_for(HERE) == ("one_shot", "two_shot")
    assert forms_for(PAIRS) == tuple(FORMS)
    assert forms_for(PAIRS[::2]) == ("one_shot", "two_shot")
    assert forms_for(tuple(each._replace(switches=()) for each in PAIRS)) == tuple(FORMS)[:5]


def test_the_command_line_names_all_forms():
    choices = EngineOptions.__dataclass_fields__["collectives"].metadata["choices"]
    assert choices == ("auto", *FORMS)


@needs_library
def test_a_room_is_shared_memory_where_there_is_some():
    def work(group):
        group.locations = HERE
        reducer = TreeReducer(group, 4, empty, Selector("one_shot"), room_bytes=1 << 16)
        room, large = reducer.room((4, 100)), reducer.room((4, 1 << 16))
        room[:] = group.rank
        return room.shape, large.shape, reducer.reduce([room]).sum(), room.flags.owndata, large.flags.owndata

    for shape, large, total, *owned in run_ranks(4, work):
        assert (shape, large, total) == ((4, 100), (4, 1 << 16), 6 * 400)
        assert owned == [False, True]
