"""Which rank takes which place of a mesh: tp inside a node, then inside a switch; the stages of a replica near by.

Sets are packed from the inside out: as many as fit into each socket, of what is left as many as fit into each node,
then below each switch, then anywhere. So no other order has more tp groups inside nodes, nor, of those that have as
many, more inside switches.

        node 0: 0 1 2   node 1: 3 4 5 6 7        tp=2: (0 1) (3 4) (5 6) are inside, (2 7) crosses
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from hpcinfer.partition.mesh import Mesh
from hpcinfer.partition.topology import Location, by_node


class _Set(NamedTuple):
    """Some ranks, and the smallest domain (switches, node, socket) that has them all."""

    path: tuple[int, ...]
    ranks: tuple[int, ...]


def place_ranks(mesh: Mesh, locations: Sequence[Location]) -> tuple[int, ...]:
    """Order ranks for a mesh: replica by replica, stage by stage, tp innermost; those that are left over come last.

    Ranks stay in order on one node, and wherever no other order is better.
    """
    consecutive = tuple(range(len(locations)))
    if len(by_node(locations)) < 2:
        return consecutive
    paths = [location.path for location in locations]
    return min(consecutive, _packed(mesh, paths), key=lambda order: _cost(mesh, order, paths))


def num_whole_replicas(mesh: Mesh, num_ranks: int) -> int:
    """How many replicas of their full size so many ranks make."""
    return min(mesh.dp, num_ranks // mesh.replica_size)


def _packed(mesh: Mesh, paths: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    ranks = sorted(_Set(path, (rank,)) for rank, path in enumerate(paths))
    groups = [_join(group) for group in _pack(ranks, mesh.tp)]
    groups = _choose(groups, num_whole_replicas(mesh, len(paths)) * mesh.pp, mesh.pp)
    replicas = sorted((_join(replica).ranks for replica in _pack(groups, mesh.pp)), key=min)
    placed = [rank for replica in replicas for rank in replica]
    taken = set(placed)
    return (*placed, *(each.ranks[0] for each in ranks if each.ranks[0] not in taken))


def _pack(sets: Sequence[_Set], size: int) -> list[list[_Set]]:
    """Put sets together, `size` at a time, in the smallest domains that have so many of them."""
    packs, rest = [], sorted(sets)
    for depth in range(max((len(each.path) for each in sets), default=0), -1, -1):
        domains: dict[tuple[int, ...], list[_Set]] = {}
        for each in rest:
            domains.setdefault(each.path[:depth], []).append(each)
        for path, inside in domains.items():
            stop = len(inside) // size * size if len(path) == depth else 0
            packs += [inside[start : start + size] for start in range(0, stop, size)]
            domains[path] = inside[stop:]
        rest = sorted(each for inside in domains.values() for each in inside)
    return packs


def _join(sets: Sequence[_Set]) -> _Set:
    """One set of all, which are in the order of their paths."""
    first, last = sets[0].path, sets[-1].path
    common = [a == b for a, b in zip(first, last, strict=False)]
    depth = common.index(False) if False in common else len(common)
    return _Set(first[:depth], tuple(rank for each in sets for rank in each.ranks))


def _choose(groups: Sequence[_Set], count: int, pp: int) -> list[_Set]:
    """The innermost groups; of those that are equally far inside, the ones that have others for a replica beside."""
    chosen: list[_Set] = []
    for depth in sorted({len(group.path) for group in groups}, reverse=True):
        level = [group for group in groups if len(group.path) == depth]
        beside = [group for replica in _pack(level, pp) for group in replica]
        placed = set(beside)
        level = [*beside, *(group for group in level if group not in placed)]
        chosen += level[: count - len(chosen)]
    return chosen


def _cost(mesh: Mesh, order: Sequence[int], paths: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """How many tp groups, then replicas, cross nodes and switches; how often a replica does; tp groups and sockets."""
    length, num_placed = len(paths[0]), num_whole_replicas(mesh, len(order)) * mesh.replica_size
    groups = _slices(order[:num_placed], mesh.tp)
    replicas = _slices(order[:num_placed], mesh.replica_size)
    depths = range(length - 1, 0, -1)  # the node's first
    hops = sum(paths[a][:-1] != paths[b][:-1] for replica in replicas for a, b in pairwise(replica))
    return (
        *(_num_crossing(groups, paths, depth) for depth in depths),
        *(_num_crossing(replicas, paths, depth) for depth in depths),
        hops,
        _num_crossing(groups, paths, length),
    )


def _slices(order: Sequence[int], size: int) -> list[Sequence[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def _num_crossing(sets: Sequence[Sequence[int]], paths: Sequence[tuple[int, ...]], depth: int) -> int:
    return sum(len({paths[rank][:depth] for rank in ranks}) > 1 for ranks in sets)
