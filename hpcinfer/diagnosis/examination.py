"""The whole examination: facts of all ranks, measurements between them, findings on the root."""

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hpcinfer.comm.library import MpiLibrary, describe_library
from hpcinfer.comm.topology import Survey, survey
from hpcinfer.diagnosis.binding import check_binding, is_crowded
from hpcinfer.diagnosis.clocks import measure_clocks
from hpcinfer.diagnosis.collecting import collect, missing
from hpcinfer.diagnosis.facts import DoctorOptions, Facts, read_facts
from hpcinfer.diagnosis.files import Shared, check_files, check_shared
from hpcinfer.diagnosis.finding import ERROR, Finding, fold, rank_ranges
from hpcinfer.diagnosis.gpu import check_gpus
from hpcinfer.diagnosis.guard import Guard
from hpcinfer.diagnosis.limits import check_limits
from hpcinfer.diagnosis.links import measure_links
from hpcinfer.diagnosis.network import Link, check_clocks, check_links
from hpcinfer.diagnosis.packing import pack, unpack
from hpcinfer.diagnosis.placement import check_placement
from hpcinfer.diagnosis.sharing import measure_sharing
from hpcinfer.diagnosis.software import check_software
from hpcinfer.diagnosis.world import check_slurm, check_world
from hpcinfer.errors import RankFailedError

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

_LINKS_S = 5.0  # for messages between ranks, at most
_LEAST_S = 1.0


class Examination(NamedTuple):
    """What was found."""

    findings: list[Finding]
    hosts: dict[int, str]  # of the ranks that answered
    is_complete: bool = True  # all ranks answered


def examine_alone(options: DoctorOptions, mpi: MpiLibrary, rank: int) -> Examination:
    """Examine this process, where there is no MPI world of all that were started. Not collective."""
    facts = read_facts(options, mpi, rank, 1)
    return Examination(judge([facts], is_whole=facts.launch.size == 1), {rank: facts.host})


def examine(world: "Collectives", options: DoctorOptions, guard: Guard, end_s: float) -> Examination | None:
    """Examine all ranks and what is between them.

    Collective over the world; when ranks are missing, only the root returns.

    Args:
        world: all ranks.
        options: what the job will be.
        guard: is told each step.
        end_s: on `time.monotonic()`, when all should be done.

    Returns:
        What was found, on the root; elsewhere nothing.
    """
    guard.step("looking at this rank and its file systems")
    own = read_facts(options, describe_library(is_started=world.size > 1), world.rank, world.size)
    guard.step("sending what this rank sees to rank 0")
    answers = collect(world, pack(own), max((end_s - time.monotonic()) / 2, _LEAST_S))
    facts = [unpack(Facts, data) for data in answers.values()]
    lost = missing(answers, world.size) if world.rank == 0 else ()
    if lost:
        found = f"{rank_ranges(lost)} did not answer: died, or stuck between the start of MPI and its first message"
        return _incomplete(facts, found, "look at their nodes: a file system that hangs, a network that drops messages")
    try:
        nodes = json.loads(world.broadcast_bytes(json.dumps(_nodes(facts)).encode() if world.rank == 0 else None))
        measured = _measure(world, nodes, options, guard, end_s)
        placement = check_placement(measured.survey, options.tp, options.pp)
    except RankFailedError:
        if world.rank != 0:
            raise
        return _incomplete(facts, f"a rank died: {guard.current}", "its launcher or its node's log may say why")
    if world.rank != 0:
        return None
    return Examination(fold([*judge(facts), *placement, *_judge_measured(measured, facts)]), _hosts(facts))


def _incomplete(facts: Sequence[Facts], found: str, hint: str) -> Examination:
    findings = [Finding(ERROR, "ranks", found, hint), *judge(facts, is_whole=False)]
    return Examination(findings, _hosts(facts), is_complete=False)


def _hosts(facts: Sequence[Facts]) -> dict[int, str]:
    return {fact.rank: fact.host for fact in facts}


def judge(facts: Sequence[Facts], *, is_whole: bool = True) -> list[Finding]:
    """Findings about what the ranks see by themselves.

    Args:
        facts: of the ranks that answered.
        is_whole: these are all ranks, so that they can be compared with nodes and allocation.
    """
    findings = check_world(facts)
    if is_whole:
        findings += [*check_slurm(facts), *check_binding(facts)]
    files = _of_nodes(check_files(facts), facts)
    return fold([*findings, *check_software(facts), *check_limits(facts), *files, *check_gpus(facts)])


class _Measured(NamedTuple):
    survey: Survey
    shared: dict[int, Shared]
    clocks: dict[int, float]
    links: list[Link]


def _measure(
    world: "Collectives", nodes: list[list[int]], options: DoctorOptions, guard: Guard, end_s: float
) -> _Measured:
    """Measure what needs several ranks. Collective over the world."""
    guard.step("asking who shares memory and switches")
    places, first = survey(world), [ranks[0] for ranks in nodes]
    shared: dict[int, Shared] = {}
    if options.output:
        guard.step("looking for files of other nodes")
        shared = measure_sharing(world, Path(options.output).absolute().parent, first)
    guard.step("comparing clocks")
    clocks = measure_clocks(world, first)
    guard.step("measuring messages between ranks")
    limit_s = min(max((end_s - time.monotonic()) / 2, _LEAST_S), _LINKS_S)
    return _Measured(places, shared, clocks, measure_links(world, nodes, limit_s))


def _judge_measured(measured: _Measured, facts: Sequence[Facts]) -> list[Finding]:
    by_rank = {fact.rank: fact for fact in facts}
    links = check_links(measured.links, by_rank, measured.survey, is_crowded=is_crowded(facts))
    shared = _of_nodes(check_shared(measured.shared), facts)
    return [*shared, *check_clocks(measured.clocks), *links]


def _of_nodes(findings: Sequence[Finding], facts: Sequence[Facts]) -> list[Finding]:
    """What one rank of a node found out about files is true of the others there."""
    nodes = {rank: tuple(ranks) for ranks in _nodes(facts) for rank in ranks}
    return [finding._replace(ranks=tuple(sorted({peer for rank in finding.ranks for peer in nodes[rank]})))
            for finding in findings]  # fmt: skip


def _nodes(facts: Sequence[Facts]) -> list[list[int]]:
    """Ranks by host; the root's comes first."""
    nodes = defaultdict(list)
    for fact in facts:
        nodes[fact.host].append(fact.rank)
    return list(nodes.values())

