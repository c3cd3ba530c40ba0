"""Which ranks form which replica, also where they are too few for equal ones."""

from collections.abc import Sequence
from typing import NamedTuple

from hpcinfer.partition.mesh import Mesh
from hpcinfer.partition.placement import num_whole_replicas


class ReplicaLayout(NamedTuple):
    """One replica."""

    mesh: Mesh  # dp is 1
    members: tuple[int, ...]  # ranks of the world, stage by stage, tp innermost


class Layout(NamedTuple):
    """All ranks of a world."""

    replicas: tuple[ReplicaLayout, ...]
    spares: tuple[int, ...]


class ModelLimits(NamedTuple):
    """What a model sets to the mesh of a replica."""

    num_layers: int  # stages at most
    grains: int  # tp ranks at most


def layout_of(mesh: Mesh, order: Sequence[int], limits: ModelLimits) -> Layout:
    """Give the ranks to replicas in the order of `place_ranks`; those that are left over are spare.

    In a world that is smaller than the mesh the last replica gets fewer ranks, or none.
    """
    size = mesh.replica_size
    num_full = num_whole_replicas(mesh, len(order))
    one = Mesh(1, mesh.pp, mesh.tp)
    replicas = [ReplicaLayout(one, tuple(order[r * size : (r + 1) * size])) for r in range(num_full)]
    rest = order[num_full * size :]
    if num_full < mesh.dp and rest:
        smaller = smaller_meshes(one, len(rest), limits)[0]
        replicas.append(ReplicaLayout(smaller, tuple(rest[: smaller.replica_size])))
        rest = rest[smaller.replica_size :]
    return Layout(tuple(replicas), tuple(rest))


def smaller_meshes(mesh: Mesh, num_ranks: int, limits: ModelLimits) -> list[Mesh]:
    """Meshes of one replica on at most `num_ranks` ranks, best first.

    More ranks are better, then as many stages as before, then as many ranks of a stage, then fewer stages.
    """
    sizes = [
        (pp, tp)
        for pp in range(1, min(num_ranks, limits.num_layers) + 1)
        for tp in range(1, min(num_ranks // pp, limits.grains) + 1)
    ]
    sizes.sort(key=lambda size: (-size[0] * size[1], size[0] != mesh.pp, size[1] != mesh.tp, size[0]))
    return [Mesh(1, pp, tp) for pp, tp in sizes]
