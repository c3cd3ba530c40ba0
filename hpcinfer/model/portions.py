"""What each rank reads, receives and sends of a store. Integers only, the same on every rank.

From the rank that reads a unit it goes to one rank of every other node along a binomial tree, in which nobody sends it
more often than log2 of the nodes, and from those to the others of their nodes. Nobody gets what it does not need, and
who has the memory in which the bytes lie is only told that they are there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from hpcinfer.model.distribution import Job, Run, by_memory, is_needed, needed_units, portion_of


class Share(NamedTuple):
    """What one rank does with a run that it needs."""

    name: str
    units: range
    sender: int | None  # None: it reads the run itself
    receivers: tuple[int, ...]
    told: tuple[int, ...] = ()  # receivers for whom the bytes lie in memory of this rank's node already
    is_told: bool = False  # the same of this rank: the sender has written them


class Portion(NamedTuple):
    """What one rank gets at once."""

    needs: Mapping[str, range]  # units by parameter, in the order of the store
    shares: tuple[Share, ...]  # which together are these


def portions_of(job: Job, runs: Iterator[Run], rank: int) -> list[Portion]:
    """What one rank reads, receives and sends, in the order of the portions."""
    plan, shares = job.plans[rank], dict[int, list[Share]]()
    for number, run in enumerate(runs):
        if rank in run.needers:
            shares.setdefault(run.portion, []).append(_share(job, run, _senders(job, run, number), rank))
    needs: dict[int, dict[str, range]] = {}
    for spec, _ in job.kinds:
        if is_needed(job.config, plan, spec.name):
            portion = portion_of(spec.name, job.config.num_layers)
            needs.setdefault(portion, {})[spec.name] = needed_units(job.config, plan, spec)
    return [Portion(needs[number], tuple(shares.get(number, ()))) for number in sorted(needs)]


def _share(job: Job, run: Run, senders: Mapping[int, int], rank: int) -> Share:
    sender, receivers = senders.get(rank), [each for each, sender in senders.items() if sender == rank]
    told = tuple(each for each in receivers if job.have_one_copy(run.name, rank, each))
    is_told = sender is not None and job.have_one_copy(run.name, rank, sender)
    return Share(run.name, run.units, sender, tuple(each for each in receivers if each not in told), told, is_told)


def _senders(job: Job, run: Run, number: int) -> dict[int, int]:
    """From whom each rank but the reader gets a run: over the network once for each node.

    Nodes take turns in the tree, and ranks of a node in being its part of it. Other nodes come first.
    """
    by_node: dict[int, list[int]] = {}
    for rank in run.needers:
        by_node.setdefault(job.nodes[rank], []).append(rank)
    at_home = by_node.pop(job.nodes[run.reader])
    others = list(by_node.values())
    turn = number % max(1, len(others))
    heads = [run.reader, *(ranks[number % len(ranks)] for ranks in (*others[turn:], *others[:turn]))]
    senders = {head: heads[_parent(place)] for place, head in enumerate(heads) if place}
    for head, ranks in zip(heads, (at_home, *others[turn:], *others[:turn]), strict=True):
        senders.update(_near_senders(job, run, head, [rank for rank in ranks if rank != head]))
    return senders


def _near_senders(job: Job, run: Run, head: int, ranks: Sequence[int]) -> dict[int, int]:
    """From whom ranks of a node get a run: from its head, or from the first that writes to the same memory."""
    return {rank: mates[0] if rank != mates[0] else head
            for mates in by_memory(job, run.name, (head, *ranks)) for rank in mates if rank != head}  # fmt: skip


def _parent(place: int) -> int:
    """In a binomial tree whose root is 0; children with more below them have lower numbers."""
    return place - (1 << (place.bit_length() - 1))
