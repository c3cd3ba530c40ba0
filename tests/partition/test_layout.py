from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.partition.layout import ModelLimits, layout_of, smaller_meshes
from hpcinfer.partition.mesh import Mesh

SIZES = st.integers(1, 5)
LIMITS = st.builds(ModelLimits, st.integers(1, 40), st.sampled_from([1, 2, 8, 16]))


@given(dp=SIZES, pp=SIZES, tp=SIZES, world_size=st.integers(1, 200), limits=LIMITS)
def test_every_rank_has_one_place(dp, pp, tp, world_size, limits):
    layout = layout_of(Mesh(dp, pp, tp), range(world_size), limits)
    ranks = [rank for replica in layout.replicas for rank in replica.members] + list(layout.spares)
    assert ranks == list(range(world_size))
    assert all(len(replica.members) == replica.mesh.world_size for replica in layout.replicas)
    assert len(layout.replicas) <= dp


@given(dp=SIZES, pp=SIZES, tp=SIZES, spares=st.integers(0, 9), limits=LIMITS)
def test_a_world_that_is_large_enough_gives_what_was_asked_for(dp, pp, tp, spares, limits):
    layout = layout_of(Mesh(dp, pp, tp), range(dp * pp * tp + spares), limits)
    assert [replica.mesh for replica in layout.replicas] == [Mesh(1, pp, tp)] * dp and len(layout.spares) == spares


@given(pp=SIZES, tp=SIZES, num_ranks=st.integers(1, 30), limits=LIMITS)
def test_smaller_meshes_fit_and_begin_with_those_that_use_most_ranks(pp, tp, num_ranks, limits):
    meshes = smaller_meshes(Mesh(1, pp, tp), num_ranks, limits)
    sizes = [mesh.world_size for mesh in meshes]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] <= num_ranks and meshes[-1] == Mesh(1, 1, 1)
    assert all(mesh.dp == 1 and mesh.pp <= limits.num_layers and mesh.tp <= limits.grains for mesh in meshes)
    if (pp, tp) in {(mesh.pp, mesh.tp) for mesh in meshes} and pp * tp == num_ranks:
        assert meshes[0] == Mesh(1, pp, tp)


def test_a_dead_rank_leaves_the_best_smaller_mesh():
    limits = ModelLimits(num_layers=12, grains=8)
    best = {(1, 4, 3): (1, 3), (1, 2, 1): (1, 1), (2, 1, 1): (1, 1), (2, 2, 3): (1, 3), (4, 1, 3): (3, 1)}
    for (pp, tp, num_ranks), expected in best.items():
        assert smaller_meshes(Mesh(1, pp, tp), num_ranks, limits)[0] == Mesh(1, *expected), (pp, tp)
