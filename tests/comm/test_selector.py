import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.comm.forms import FORMS, forms_for
from hpcinfer.comm.selector import OPERATIONS, Point, Selector, estimate, interpolate, nearest, shape_of
from hpcinfer.partition.grains import grain_runs, subtrees
from hpcinfer.partition.topology import Location

PAIRS = tuple(Location((), node, 0) for node in (0, 0, 1, 1, 2, 2, 3, 3))
SPANS = [subtrees(run) for run in grain_runs(8, 8)]


def locations_of(nodes, switches=None):
    return tuple(Location((switches[node],) if switches else (), node, 0) for node in nodes)


def test_the_fastest_measured_form_is_chosen_for_each_size():
    curves = {"leader": [Point(1000, 10e-6), Point(100_000, 900e-6)],
              "node_two_shot": [Point(1000, 50e-6), Point(100_000, 200e-6)]}  # fmt: skip
    choose = Selector(table={"2+2+2+2": {"all_reduce": curves}}).chooser(PAIRS, SPANS)
    assert [choose(size) for size in (0, 1, 1000, 5000)] == ["leader"] * 4
    assert [choose(size) for size in (50_000, 100_000, 1 << 24)] == ["node_two_shot"] * 3


def test_forms_that_a_group_cannot_have_and_other_shapes_are_not_taken_from_a_table():
    sums = {"switch_one_shot": [Point(1, 1e-9)], "two_shot": [Point(1, 1.0)], "leader": []}
    table = {"2+2+2+2": {"all_reduce": sums}, "8": {"all_reduce": {"one_shot": [Point(1, 1e-9)]}}}
    assert Selector(table=table).chooser(PAIRS, SPANS)(1) == "two_shot"


def test_an_operation_takes_the_way_that_was_faster_for_its_size():
    curves = {"node": [Point(1000, 1e-6), Point(100_000, 9e-6)], "mpi": [Point(1000, 2e-6), Point(100_000, 8e-6)]}
    way_of = Selector(table={"2+2+2+2": {"send": curves}}).way_chooser(PAIRS, 8)
    assert [way_of("send", size) for size in (0, 1000, 100_000, 1 << 30)] == ["node", "node", "mpi", "mpi"]
    assert way_of("gather", 100) == Selector().way_chooser(PAIRS, 8)("gather", 100)  # of which nothing was measured


@pytest.mark.parametrize(("seconds", "is_long"), [
    ((100e-6, 400e-6), False),  # short
    ((900e-6, 1000e-6), False),  # two halves would take twice as long
    ((900e-6, 90e-3), True),
])
def test_long_sums_that_take_hardly_longer_in_halves_are_hidden(seconds, is_long):
    curves = {"leader": [Point(1, seconds[0]), Point(1 << 20, seconds[1])],
              "two_shot": [Point(1, 1.0), Point(1 << 20, 1.0)]}  # fmt: skip
    table = {"2+2+2+2": {"all_reduce": curves}, "8": {"all_reduce": curves}}
    judge = Selector(table=table).judge(PAIRS, 8)
    assert judge(1 << 20, 32) is is_long
    assert not judge(1 << 20, 31)  # few rows: both halves read all weights
    assert not Selector("two_shot", table).judge(PAIRS, 8)(1 << 20, 32)  # 1 s, whatever the size
    assert not Selector(table=table).judge(locations_of([0] * 8), 8)(1 << 20, 32)  # in memory there is no wait
    assert not Selector().judge(PAIRS, 8)(1 << 30, 1000)  # nobody has measured
    for overlap in ("always", "never"):
        assert Selector(table=table, overlap=overlap).judge(PAIRS, 8)(1 << 20, 1) is (overlap == "always")


def test_without_a_table_every_operation_has_a_way():
    way_of = Selector().way_chooser(PAIRS[:2], 2)
    ways = {name: [way_of(name, size) for size in (0, 1 << 10, 1 << 30)] for name in OPERATIONS}
    assert ways["send"] == ["node", "node", "mpi"] and ways["broadcast"] == ["node"] * 3
    one_way = Selector(table={"2": {"send": {"node": [Point(1, 1.0)]}}}).way_chooser(PAIRS[:2], 2)
    assert one_way("send", 1 << 30) == "mpi"  # half a measurement is none


@given(size=st.integers(0, 1 << 26))
def test_times_between_measured_sizes_lie_between_theirs(size):
    points = [Point(1 << 10, 3.0), Point(1 << 14, 5.0), Point(1 << 24, 900.0)]
    found = interpolate(points, size)
    for low, high in zip(points, points[1:], strict=False):
        if low.num_bytes <= size <= high.num_bytes:
            assert low.seconds <= found <= high.seconds
    assert found == 3.0 if size <= 1 << 10 else found > 3.0
    assert size <= 1 << 24 or found == 900.0 * size / (1 << 24)


def test_without_a_table_few_bytes_take_few_messages_and_many_take_the_fewest_bytes():
    choose = Selector().chooser(PAIRS, SPANS)
    assert choose(1024) in ("leader", "node_one_shot", "one_shot")
    assert choose(1 << 20) == choose(1 << 24) == "node_two_shot"
    apart = Selector().chooser(locations_of(range(8)), SPANS)
    assert (apart(1024), apart(1 << 24)) == ("one_shot", "two_shot")


def test_estimated_bytes_are_those_of_the_algorithm():
    """Two shots between four nodes: three quarters of the sum leave a node twice."""
    curve = estimate(FORMS["node_two_shot"], PAIRS, SPANS)
    per_byte = (curve[1].seconds - curve[0].seconds) / (curve[1].num_bytes - curve[0].num_bytes)
    far, near = 2 * 0.75 / 1.0e9, 2 * 2 * 0.5 / 4.0e9
    assert per_byte == pytest.approx(far + near, rel=1e-6)


@given(nodes=st.lists(st.integers(0, 3), min_size=2, max_size=8), size=st.integers(0, 1 << 25))
def test_every_group_has_a_choice_that_it_can_do(nodes, size):
    for locations in (locations_of(nodes), locations_of(nodes, (0, 0, 1, 1)), None):
        spans = [subtrees(run) for run in grain_runs(8, len(nodes))]
        assert Selector().chooser(locations, spans)(size) in forms_for(locations)


@pytest.mark.parametrize("wanted, locations, form", [
    ("switch_two_shot", PAIRS, "node_two_shot"), ("switch_two_shot", None, "two_shot"), ("leader", None, "one_shot"),
    ("node_one_shot", PAIRS[:2], "one_shot"), ("leader", PAIRS, "leader"), ("one_shot", PAIRS, "one_shot"),
    ("switch_one_shot", locations_of((0, 0, 1, 1, 2, 2, 3, 3), (0, 0, 1, 1)), "switch_one_shot"),
])  # fmt: skip
def test_a_form_that_is_asked_for_is_taken_with_as_many_levels_as_there_are(wanted, locations, form):
    spans = [subtrees(run) for run in grain_runs(8, 8 if locations is None else len(locations))]
    assert nearest(wanted, forms_for(locations)) == form
    assert {Selector(wanted).chooser(locations, spans)(size) for size in (1, 1 << 24)} == {form}


@pytest.mark.parametrize("nodes, switches, shape", [
    ((0, 0, 1, 1), None, "2+2"), ((0, 1, 1, 1), None, "1+3"), ((0, 0, 0), None, "3"),
    ((0, 0, 1, 1, 2, 2, 3, 3), (0, 0, 1, 1), "2+2|2+2"),
])  # fmt: skip
def test_groups_of_one_shape_share_measurements(nodes, switches, shape):
    assert shape_of(locations_of(nodes, switches), len(nodes)) == shape
    assert shape_of(None, 4) == "4 anywhere"


def test_ways_that_are_alike_are_chosen_as_if_nothing_had_been_measured():
    def way_of(node_s, mpi_s, size):
        curves = {"node": [Point(1000, node_s)], "mpi": [Point(1000, mpi_s)]}
        return Selector(table={"2": {"send": curves}}).way_chooser(PAIRS[:2], 2)("send", size)

    assert [way_of(1.0, 1.09, size) for size in (1000, 1 << 20)] == ["node", "mpi"]
    assert [way_of(1.09, 1.0, size) for size in (1000, 1 << 20)] == ["node", "mpi"]
    assert [way_of(1.0, 1.2, size) for size in (1000, 1 << 20)] == ["node", "node"]
    assert [way_of(1.2, 1.0, size) for size in (1000, 1 << 20)] == ["mpi", "mpi"]


def test_gpus_take_the_transport_and_form_that_were_measured_to_be_fastest():
    curves = {"nccl:one_shot": [Point(1000, 10e-6), Point(100_000, 900e-6)],
              "mpi:two_shot": [Point(1000, 50e-6), Point(100_000, 200e-6)],
              "nccl:library": [Point(1, 1e-6), Point(1 << 26, 1e-6)]}  # fmt: skip
    selector = Selector(table={"2+2+2+2 of GPUs": {"all_reduce": curves}, "2+2+2+2": {"all_reduce": {}}})
    choose = selector.gpu_chooser(PAIRS, SPANS, ["nccl", "mpi"])
    assert [choose(size) for size in (1, 1000, 100_000, 1 << 24)] == ["nccl:one_shot"] * 2 + ["mpi:two_shot"] * 2
    assert selector.gpu_chooser(PAIRS, SPANS, ["nccl"])(1 << 24) == "nccl:one_shot"
    assert selector.gpu_chooser(PAIRS, SPANS, ["nccl", "mpi"], is_exact=False)(1 << 24) == "nccl:library"
    only_mpi = Selector(table={"2+2+2+2 of GPUs": {"all_reduce": {"mpi:two_shot": [Point(1, 1e-9)]}}})
    assert only_mpi.gpu_chooser(PAIRS, SPANS, ["nccl", "mpi"])(1 << 24).startswith("nccl:")  # half a measurement


def test_gpus_of_which_nothing_was_measured_take_nccl_in_the_form_that_was_asked_for():
    for wanted, forms in (("auto", forms_for(PAIRS)), ("leader", ("leader",))):
        choose = Selector(wanted).gpu_chooser(PAIRS, SPANS, ["nccl", "mpi"])
        assert {choose(1 << k) for k in range(26)} <= {f"nccl:{form}" for form in forms}
    assert Selector().gpu_chooser(PAIRS, SPANS, ["nccl"], is_exact=False)(1) == "nccl:library"
    assert Selector("leader").gpu_chooser(PAIRS, SPANS, ["nccl"], is_exact=False)(1) == "nccl:leader"
    assert Selector().gpu_chooser(PAIRS, SPANS, ["mpi"])(1).startswith("mpi:")
