import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.errors import ConfigError, MeshError
from hpcinfer.partition.mesh import Coord, Mesh, resolve_mesh, stage_layers

sizes = st.integers(1, 6)


@given(dp=sizes, pp=sizes, tp=sizes)
def test_coord_and_rank_are_inverse(dp, pp, tp):
    mesh = Mesh(dp, pp, tp)
    coords = [mesh.coord(rank) for rank in range(mesh.world_size)]
    assert [mesh.rank(coord) for coord in coords] == list(range(mesh.world_size))
    assert coords == [Coord(d, p, t) for d in range(dp) for p in range(pp) for t in range(tp)]
    assert mesh.replica_size * dp == mesh.world_size


def test_tp_ranks_are_neighbours():
    mesh = Mesh(2, 2, 3)
    assert [mesh.coord(rank) for rank in (3, 4, 5)] == [Coord(0, 1, 0), Coord(0, 1, 1), Coord(0, 1, 2)]
    assert str(mesh) == "dp=2 pp=2 tp=3"


@given(dp=sizes, pp=sizes, tp=sizes)
def test_data_parallel_size_is_the_rest_of_the_world(dp, pp, tp):
    assert resolve_mesh(dp * pp * tp, tp, pp, None) == resolve_mesh(dp * pp * tp, tp, pp, dp) == Mesh(dp, pp, tp)


@pytest.mark.parametrize(
    ("world_size", "tp", "pp", "dp", "equation"),
    [
        (8, 2, 2, 1, "dp(1) * pp(2) * tp(2) = 4 != world size (8)"),
        (7, 2, 1, None, "dp(3) * pp(1) * tp(2) = 6 != world size (7)"),
        (1, 2, 2, None, "dp(1) * pp(2) * tp(2) = 4 != world size (1)"),
    ],
)
def test_wrong_world_is_refused_with_the_equation(world_size, tp, pp, dp, equation):
    with pytest.raises(MeshError) as caught:
        resolve_mesh(world_size, tp, pp, dp)
    assert caught.value.found == equation and "mpirun -n" in caught.value.hint


@pytest.mark.parametrize(("name", "tp", "pp", "dp"), [("tensor", 0, 1, 1), ("pipeline", 1, -2, 1), ("data", 1, 1, 0)])
def test_sizes_below_one_are_refused_by_name(name, tp, pp, dp):
    with pytest.raises(MeshError, match=f"^{name}_parallel_size="):
        resolve_mesh(4, tp, pp, dp)


def test_stages_cover_all_layers():
    assert stage_layers(5, 2) == [range(0, 3), range(3, 5)]
    assert [len(layers) for layers in stage_layers(61, 4)] == [16, 15, 15, 15]
    for num_layers in range(1, 60):
        for stages in range(1, num_layers + 1):
            layers = stage_layers(num_layers, stages)
            assert [layer for stage in layers for layer in stage] == list(range(num_layers)) and all(layers)


def test_more_stages_than_layers_are_refused():
    with pytest.raises(MeshError, match=r"pipeline_parallel_size=4 .*\(3\)"):
        stage_layers(3, 4)
    with pytest.raises(ConfigError):
        stage_layers(3, 0)
