"""Weights of which the ranks of a node have one copy: those that are used as stored, which is the vocabulary table.

Replicas whose ranks share a node hold the same rows of it. They lie in memory that all of them map; one rank receives
or reads each row and tells the others (`hpcinfer.model.portions`).
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpcinfer.comm.node.library import load
from hpcinfer.comm.node.region import FOLDER, PAGE, open_region
from hpcinfer.comm.protocol import Collectives
from hpcinfer.dtypes import STORAGE
from hpcinfer.kernels.protocol import Kernels
from hpcinfer.model.distribution import Job, needed_units, unit_bytes
from hpcinfer.model.weights_of import is_read_as_stored

if TYPE_CHECKING:
    from hpcinfer.weights.reader import Store

_TABLE = "embed_tokens.weight"


class Commons(NamedTuple):
    """What is common on some node."""

    names: frozenset[str]  # the same on all ranks
    arrays: dict[str, np.ndarray]  # of this rank


class _Pages(NamedTuple):
    """A region with a part of equal size for each rank, where rows of a table lie one after the other."""

    size: int  # ranks
    part_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of the region."""
        return self.size * self.part_bytes


class _Rows(NamedTuple):
    """Rows of the table that several ranks of a node hold."""

    units: range
    ranks: tuple[int, ...]


def keeps_table(store: Store, kernels: Kernels, dtype: str) -> bool:
    """Whether the vocabulary table is used as stored, computing in this precision. Not collective."""
    stored = store.parameters[_TABLE].dtype
    return kernels.keeps_table(stored) and is_read_as_stored(dtype, stored)


def has_commons(store: Store, job: Job) -> bool:
    """Whether ranks of some node hold the same. Not collective: all ranks come to the same answer."""
    return any(_rows_by_node(store, job).values())


def open_commons(store: Store, job: Job, world: Collectives) -> Commons | None:
    """Make memory for what the ranks of each node hold in common.

    Collective over the world.

    Args:
        store: which is loaded.
        job: who loads what; `has_commons`.
        world: all ranks, numbered as in the job.

    Returns:
        None on every rank, if ranks of some node cannot share memory, or there is too little of it.
    """
    rows = _rows_by_node(store, job).get(job.nodes[world.rank], [])
    here = [rank for rank, node in enumerate(job.nodes) if node == job.nodes[world.rank]]
    starts = [0, *accumulate(_up(len(each.units) * unit_bytes(store, _TABLE), PAGE) for each in rows)]
    wanted = _Pages(len(here), max(PAGE, _up(-(-starts[-1] // len(here)), PAGE)))
    instead = "each rank of this node has a vocabulary table of its own"
    region = open_region(world, here, [wanted], FOLDER, load(), instead=instead)
    if region is None:
        return None
    memory = np.frombuffer(region[0], np.uint8)
    own = [_array(store, memory[start:], len(each.units))
           for start, each in zip(starts, rows, strict=False) if world.rank in each.ranks]  # fmt: skip
    return Commons(frozenset({_TABLE}), dict(zip([_TABLE], own, strict=False)))


def _rows_by_node(store: Store, job: Job) -> dict[int, list[_Rows]]:
    """Rows of the table that several ranks of a node hold."""
    holders: dict[tuple[int, range], list[int]] = {}
    for rank, plan in job.plans.items():
        if units := needed_units(job.config, plan, store.spec(_TABLE)):
            holders.setdefault((job.nodes[rank], units), []).append(rank)
    found: dict[int, list[_Rows]] = {}
    for (node, units), ranks in holders.items():
        if len(ranks) > 1:
            found.setdefault(node, []).append(_Rows(units, tuple(ranks)))
    return found


def _array(store: Store, memory: np.ndarray, num_units: int) -> np.ndarray:
    raw = memory[: num_units * unit_bytes(store, _TABLE)]
    return raw.view(STORAGE[store.parameters[_TABLE].dtype]).reshape(num_units, *store.spec(_TABLE).shape[1:])


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
