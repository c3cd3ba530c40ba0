from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.partition.grains import Span, grain_runs, subtrees
from hpcinfer.partition.lanes import COLUMNS, cut, levels_of


@st.composite
def worlds(draw):
    """Ranks on nodes, nodes below switches, all with grains; nodes need not be runs of ranks."""
    grains = draw(st.sampled_from([4, 8, 16]))
    size = draw(st.integers(1, grains))
    node = draw(st.lists(st.integers(0, size - 1), min_size=size, max_size=size))
    switch_of = draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    levels = draw(st.integers(0, 2))
    units = [node, [switch_of[each] for each in node]][:levels] + [[0] * size]
    return grains, units, [subtrees(run) for run in grain_runs(grains, size)], draw(st.booleans())


@given(world=worlds())
def test_every_lane_ends_with_the_whole_tree_and_peers_agree_on_each_other(world):
    grains, units, spans, has_lanes = world
    plans = [levels_of(rank, units, spans, has_lanes=has_lanes) for rank in range(len(spans))]
    for rank, plan in enumerate(plans):
        assert all(level.is_adder for level in plan[:-1])
        assert len(plan) == len(units) or not plan[-1].is_adder
        for depth, level in enumerate(plan):
            assert level.peers[level.place] == rank
            for place, peer in enumerate(level.peers):
                assert plans[peer][depth] == level._replace(place=place)
    ends = [plan[-1] for plan in plans if len(plan) == len(units)]
    assert ends and all(level.program.outputs == (Span(0, grains),) for level in ends)


@given(world=worlds())
def test_a_lane_has_one_rank_in_each_unit(world):
    _, units, spans, has_lanes = world
    for depth, unit_of in enumerate(units[:-1]):
        lanes = {}
        for rank in range(len(spans)):
            plan = levels_of(rank, units, spans, has_lanes=has_lanes)
            if len(plan) > depth and plan[depth].is_adder:
                lanes.setdefault(tuple(level.place for level in plan[: depth + 1]), []).append(unit_of[rank])
        for there in lanes.values():
            assert sorted(there) == sorted(set(unit_of))


def test_nodes_of_equal_runs_bring_one_subtree_each():
    spans = [subtrees(run) for run in grain_runs(8, 8)]
    first, second = levels_of(3, [[0, 0, 1, 1, 2, 2, 3, 3], [0] * 8], spans)
    assert (first.peers, first.program.outputs) == ((2, 3), (Span(2, 4),))
    assert (second.peers, second.place, second.width) == ((1, 3, 5, 7), 1, 4)
    alone = levels_of(3, [[0, 0, 1, 1, 2, 2, 3, 3], [0] * 8], spans, has_lanes=False)
    assert len(alone) == 1 and alone[0].width == 1


@given(start=st.integers(0, 1000), length=st.integers(0, 5000), width=st.integers(1, 16))
def test_slices_cover_the_columns_in_whole_lines(start, length, width):
    slices = cut(range(start, start + length), width)
    assert len(slices) == width and slices[0].start == start and slices[-1].stop == start + length
    assert all(a.stop == b.start for a, b in zip(slices, slices[1:], strict=False))
    inner = [each.stop for each in slices[:-1] if each.stop < start + length]
    assert all((stop - start) % COLUMNS == 0 for stop in inner)
    assert max(map(len, slices)) <= -(-length // width) + 2 * COLUMNS
