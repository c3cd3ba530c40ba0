"""Findings about the places of ranks: what shares a node or a switch, and which tp groups cross them."""

import math
from collections.abc import Sequence

from hpcinfer.comm.seating import describe_seats, spread_of, tp_groups
from hpcinfer.comm.topology import Survey
from hpcinfer.diagnosis.finding import ERROR, OK, WARNING, Finding, ranges
from hpcinfer.errors import MeshError
from hpcinfer.partition.layout import Layout, ModelLimits, layout_of
from hpcinfer.partition.mesh import Mesh, resolve_mesh
from hpcinfer.partition.placement import place_ranks
from hpcinfer.partition.topology import NODE, by_node, by_switch, level_of

_CHECK = "placement"
_EVEN = "as many ranks on each node, a multiple of tp: srun --ntasks-per-node, or mpirun --map-by ppr:N:node"


def check_placement(survey: Survey, tp: int, pp: int) -> list[Finding]:
    """Judge the places that ranks take in a mesh.

    Args:
        survey: where they run.
        tp: ranks that share each layer, as of the job.
        pp: stages that share the layers, as of the job.
    """
    if len(survey.locations) < 2:
        return []
    findings = [Finding(OK, _CHECK, _nodes(survey))]
    try:
        mesh = resolve_mesh(len(survey.locations), tp, pp, None)
    except MeshError as error:
        hint = error.hint or error.expected
        return [*findings, Finding(ERROR, _CHECK, f"{error.found}", hint)]
    if mesh.replica_size == 1:
        return findings
    order = place_ranks(mesh, survey.locations)
    layout = layout_of(mesh, order, ModelLimits(pp, tp))
    return [*findings, Finding(OK, _CHECK, _mesh(mesh, layout, survey, order)), *_crossing(mesh, layout, survey)]


def _nodes(survey: Survey) -> str:
    """Nodes, their ranks and sockets, and what is known of switches."""
    counts = [len(ranks) for ranks in by_node(survey.locations)]
    sockets = {(location.node, location.socket) for location in survey.locations}
    words = [f"{sum(counts)} ranks on {len(counts)} node{'s' * (len(counts) > 1)}"]
    if len(counts) > 1:
        words.append(f"{ranges(set(counts))} on each")
    if len(sockets) > len(counts):
        words.append(f"on {len(sockets)} sockets")
    if survey.switches:
        words.append(f"below {len(by_switch(survey.locations))} switches")
    elif len(counts) > 1:
        words.append("switches unknown")
    return ", ".join(words)


def _mesh(mesh: Mesh, layout: Layout, survey: Survey, order: Sequence[int]) -> str:
    """Who is where, and why."""
    is_changed = tuple(order) != tuple(range(len(order)))
    why = "; ranks are taken out of order, to keep tp inside nodes and switches" if is_changed else ""
    return f"{mesh}: {describe_seats(layout, survey)}{why}"


def _crossing(mesh: Mesh, layout: Layout, survey: Survey) -> list[Finding]:
    """Tp groups that no order of these ranks keeps inside a node."""
    groups = tp_groups(layout)
    crossing = [group for group in groups if level_of([survey.locations[rank] for rank in group]) != NODE]
    if not crossing:
        return []
    spread = spread_of(groups, survey)
    where = f"{spread.all} of them switches too" if survey.switches and spread.all else ""
    found = f"{len(crossing)} of {len(groups)} tp groups cross nodes{where and ', ' + where}: each layer waits for them"
    ranks = tuple(sorted(rank for group in crossing for rank in group))
    return [Finding(WARNING, _CHECK, found, _advice(mesh, survey), ranks)]


def _advice(mesh: Mesh, survey: Survey) -> str:
    """A tp that all nodes hold, nearest to the one that was asked for; else how to start the ranks."""
    counts = [len(ranks) for ranks in by_node(survey.locations)]
    common = math.gcd(*counts)
    holding = [tp for tp in range(2, common + 1) if common % tp == 0]
    near = [tp for tp in holding if tp < mesh.tp][-1:] + [tp for tp in holding if tp > mesh.tp][:1]
    if not near:
        return _EVEN
    each = f"the {counts[0]} ranks of a node" if len(set(counts)) == 1 else f"{ranges(set(counts))} ranks of a node"
    return f"tp={mesh.tp} does not divide {each}; tp={' or '.join(map(str, near))} keeps it inside"
