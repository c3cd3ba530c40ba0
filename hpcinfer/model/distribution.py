"""Who reads which units of a store. Integers only, the same on every rank.

A model comes in portions, in the order in which they are used: the vocabulary table, the two halves of each layer, the
head. Of the ranks that need a unit one reads it, for all (`hpcinfer.model.portions`); who has a copy staged takes that.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from hpcinfer.config import ModelConfig
from hpcinfer.dtypes import STORAGE
from hpcinfer.model.shard import ShardPlan, kv_heads
from hpcinfer.weights.schema import KV_HEADS, WHOLE, ParamSpec

if TYPE_CHECKING:
    from hpcinfer.weights.reader import Store

REQUEST_BYTES = 16 << 20  # a rank is to read no less at once, where there is so much
_SMALL_BYTES = 256 << 10  # so little is read by who reads beside it
_OF_ATTENTION = ("input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


class StoredKind(NamedTuple):
    """A stored parameter."""

    spec: ParamSpec
    unit_bytes: int


class Run(NamedTuple):
    """Neighbouring units that one rank reads for all that need them."""

    portion: int
    name: str
    units: range
    reader: int
    needers: tuple[int, ...]  # the reader among them
    is_staged: bool  # where the reader reads


@dataclass(frozen=True)
class Job:
    """All ranks that load, and what each of them is to hold."""

    config: ModelConfig
    kinds: Sequence[StoredKind]  # in the order of the store
    plans: Mapping[int, ShardPlan]  # by rank
    nodes: Sequence[int]  # by rank
    common: frozenset[str] = frozenset()  # parameters of which the ranks of a node have one copy

    def have_one_copy(self, name: str, rank: int, other: int) -> bool:
        """Whether two ranks write to and read from the same memory."""
        if name not in self.common or self.nodes[rank] != self.nodes[other]:
            return False
        spec = next(kind.spec for kind in self.kinds if kind.spec.name == name)
        return needed_units(self.config, self.plans[rank], spec) == needed_units(self.config, self.plans[other], spec)


def job_of(
    store: Store, plans: Mapping[int, ShardPlan], nodes: Sequence[int], common: frozenset[str] = frozenset()
) -> Job:
    """Say who loads what of a store. Not collective."""
    kinds = [StoredKind(store.spec(name), unit_bytes(store, name)) for name in store.parameters]
    return Job(store.config, kinds, plans, nodes, common)


def unit_bytes(store: Store, name: str) -> int:
    """Size of one unit of a parameter. Not collective."""
    return math.prod(store.spec(name).shape[1:]) * STORAGE[store.parameters[name].dtype].itemsize


@dataclass
class _Balance:
    """Bytes that are read so far."""

    by_rank: Counter[int] = field(default_factory=Counter)
    by_node: Counter[int] = field(default_factory=Counter)
    here: Counter[int] = field(default_factory=Counter)  # by rank, of this portion

    def add(self, rank: int, node: int, num_bytes: int) -> None:
        """Count what a rank is to read."""
        for counter, key in ((self.by_rank, rank), (self.by_node, node), (self.here, rank)):
            counter[key] += num_bytes


class _Unit(NamedTuple):
    """One unit, as far as who reads it goes."""

    name: str
    unit: int
    num_bytes: int


class _Needers(NamedTuple):
    """Who needs a unit."""

    waiting: tuple[int, ...]
    staged: tuple[int, ...]  # those that have a copy on their node


def needed_units(config: ModelConfig, plan: ShardPlan, spec: ParamSpec) -> range:
    """Units of a parameter that a rank with this plan is built from."""
    if not is_needed(config, plan, spec.name):
        return range(0)
    if spec.axis == WHOLE:
        return range(1)
    return kv_heads(config, plan) if spec.axis == KV_HEADS else plan.run


def portion_of(name: str, num_layers: int) -> int:
    """Number of the portion that a parameter belongs to: 0 the table, then two for each layer, then the head."""
    if not name.startswith("layers."):
        return 0 if name.startswith("embed_tokens.") else 2 * num_layers + 1
    _, layer, module, _ = name.split(".")
    return 1 + 2 * int(layer) + (module not in _OF_ATTENTION)


def distribute(
    job: Job, is_staged: Callable[[int, str, int], bool] | None = None, request_bytes: int = REQUEST_BYTES
) -> Iterator[Run]:  # fmt: skip
    """Say who reads what, portion by portion; bytes are balanced over ranks, then over nodes.

    Args:
        job: who loads what.
        is_staged: whether a rank has a copy of a unit of a parameter on its node; None if there are none.
        request_bytes: a portion is cut into reads that are not smaller, as long as it is larger.
    """
    portions: dict[int, list[StoredKind]] = {}
    for kind in job.kinds:
        portions.setdefault(portion_of(kind.spec.name, job.config.num_layers), []).append(kind)
    holders: dict[ShardPlan, list[int]] = {}
    for rank, plan in job.plans.items():
        holders.setdefault(plan, []).append(rank)
    balance = _Balance()
    for portion, kinds in sorted(portions.items()):
        balance.here.clear()
        groups = _groups(job, kinds, holders, is_staged)
        for needers, units in sorted(groups.items(), key=lambda item: -_num_bytes(item[1])):
            if needers.staged:
                yield from _staged_runs(portion, units, needers, job)
            else:
                yield from _read_runs(portion, units, needers.waiting, job, balance, request_bytes)


def is_needed(config: ModelConfig, plan: ShardPlan, name: str) -> bool:
    """Whether a rank with this plan is built from something of a parameter."""
    if name.startswith("layers."):
        return int(name.split(".", 2)[1]) in plan.layers
    if name.startswith("embed_tokens."):
        return plan.is_first or (plan.is_last and config.tie_word_embeddings)
    return plan.is_last


def _groups(
    job: Job, kinds: Sequence[StoredKind], holders: Mapping[ShardPlan, list[int]],
    is_staged: Callable[[int, str, int], bool] | None,
) -> dict[_Needers, list[_Unit]]:  # fmt: skip
    """Units of a portion by who needs them."""
    groups: dict[_Needers, list[_Unit]] = {}
    ranks_of: dict[tuple[ShardPlan, ...], tuple[int, ...]] = {}
    for spec, unit_bytes in kinds:
        needed = [(needed_units(job.config, plan, spec), plan) for plan in holders]
        for unit in range(spec.shape[0]):
            plans = tuple(plan for units, plan in needed if unit in units)
            if plans not in ranks_of:
                ranks_of[plans] = tuple(sorted(rank for plan in plans for rank in holders[plan]))
            needers = _Needers(ranks_of[plans], ())
            if is_staged is not None:
                needers = _by_copy(needers.waiting, [is_staged(rank, spec.name, unit) for rank in needers.waiting])
            groups.setdefault(needers, []).append(_Unit(spec.name, unit, unit_bytes))
    return {needers: units for needers, units in groups.items() if any(needers)}


def _by_copy(ranks: Sequence[int], has_copy: Sequence[bool]) -> _Needers:
    waiting = tuple(rank for rank, has in zip(ranks, has_copy, strict=True) if not has)
    return _Needers(waiting, tuple(rank for rank, has in zip(ranks, has_copy, strict=True) if has))


def _staged_runs(portion: int, units: Sequence[_Unit], needers: _Needers, job: Job) -> Iterator[Run]:
    """Each rank that has a staged copy reads that, and sends it to some of those that have none; ranks that write to
    the same memory count as one."""
    readers = frozenset(needers.staged)
    for name, run in _joined(units):
        memories = by_memory(job, name, (*needers.staged, *needers.waiting))
        staged = [ranks for ranks in memories if ranks[0] in readers]
        waiting = [ranks for ranks in memories if ranks[0] not in readers]
        for place, ranks in enumerate(staged):
            served = [rank for others in waiting[place :: len(staged)] for rank in others]
            yield Run(portion, name, run, ranks[0], (*ranks, *served), is_staged=True)


def by_memory(job: Job, name: str, ranks: Sequence[int]) -> list[list[int]]:
    """Ranks that write to the same memory together, in the order of the first ones."""
    if name not in job.common:
        return [[rank] for rank in ranks]
    memories: list[list[int]] = []
    for rank in ranks:
        mates = next((each for each in memories if job.have_one_copy(name, each[0], rank)), None)
        if mates is None:
            memories.append([rank])
        else:
            mates.append(rank)
    return memories


def _read_runs(
    portion: int, units: Sequence[_Unit], needers: tuple[int, ...], job: Job, balance: _Balance, request_bytes: int
) -> Iterator[Run]:
    """Cut units into parts of about the same size, and give each to the rank that has the least to read."""
    total, nodes = _num_bytes(units), job.nodes
    count = min(len(needers), max(1, total // request_bytes))
    if total < _SMALL_BYTES:
        readers = [max(needers, key=lambda rank: (balance.here[rank], -balance.by_rank[rank], -rank))]
    else:
        order = sorted(needers, key=lambda rank: (balance.by_rank[rank], balance.by_node[nodes[rank]], rank))
        readers = order[:count]
    for reader, part in zip(readers, _parts(units, len(readers)), strict=True):
        balance.add(reader, nodes[reader], _num_bytes(part))
        for name, run in _joined(part):
            yield Run(portion, name, run, reader, needers, is_staged=False)


def _parts(units: Sequence[_Unit], count: int) -> list[Sequence[_Unit]]:
    """Cut a list of units into parts of about as many bytes; some may be empty."""
    total, ends, done = _num_bytes(units), [0], 0
    for place, unit in enumerate(units):
        while len(ends) < count and (done + unit.num_bytes / 2) * count >= total * len(ends):
            ends.append(place)
        done += unit.num_bytes
    ends += [len(units)] * (count + 1 - len(ends))
    return [units[start:end] for start, end in pairwise(ends)]


def _joined(units: Sequence[_Unit]) -> Iterator[tuple[str, range]]:
    """Neighbouring units of a parameter together."""
    start = 0
    for place in range(1, len(units) + 1):
        last = units[place - 1]
        if place == len(units) or units[place][:2] != (last.name, last.unit + 1):
            yield last.name, range(units[start].unit, last.unit + 1)
            start = place


def _num_bytes(units: Sequence[_Unit]) -> int:
    return sum(unit.num_bytes for unit in units)
