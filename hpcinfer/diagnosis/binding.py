"""Findings about CPUs: ranks and threads against the cores that they may run on."""

from collections import defaultdict
from collections.abc import Sequence

from hpcinfer.diagnosis.facts import Facts
from hpcinfer.diagnosis.finding import ERROR, OK, WARNING, Finding, ranges

CPUs = frozenset[int]

_OPENMP = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")
_FEWER = "fewer ranks, or fewer threads ($OMP_NUM_THREADS, --threads)"
_UNPIN = (
    "srun --cpus-per-task=N --cpu-bind=cores, or mpirun --map-by ppr:N:node:pe=M; masks may be inherited from the shell"
)


def check_binding(facts: Sequence[Facts]) -> list[Finding]:
    """Judge how the ranks of each node share its CPUs."""
    machines = defaultdict(list)
    for fact in facts:
        machines[fact.machine].append(fact)
    problems = [Finding(ERROR, "threads", fact.processors.problem, "--threads N says it", (fact.rank,))
                for fact in facts if fact.processors.problem]  # fmt: skip
    return problems + [finding for ranks in machines.values() for finding in _check_machine(ranks)]


def is_crowded(facts: Sequence[Facts]) -> bool:
    """Whether ranks anywhere take turns on a CPU, so that measured times say little."""
    return any(finding.check == "cores" and finding.level != OK for finding in check_binding(facts))


def _check_machine(facts: Sequence[Facts]) -> list[Finding]:
    """All findings of one node; ranks with equal masks are judged together."""
    groups: dict[CPUs, list[Facts]] = defaultdict(list)
    for fact in facts:
        groups[frozenset(fact.processors.cpus)].append(fact)
    union = frozenset().union(*groups)
    wanted = sum(fact.processors.threads for fact in facts)
    crowded = [_crowd(cpus, ranks, union) for cpus, ranks in groups.items()]
    findings = [finding for finding in crowded if finding]
    if not findings and wanted > len(union):
        findings = [_finding(WARNING, facts, f"{_count(facts)} on {len(union)} CPUs: they take turns", _FEWER)]
    if not findings:
        findings = [*_overlaps(groups), *_openmp(groups), *_idle(facts, union, wanted)]
    if not findings:
        found = f"{_count(facts)} on a node, each with a CPU of its own: {wanted} of {len(union)} CPUs used"
        findings = [_finding(OK, facts, found)]
    return findings


def _crowd(cpus: CPUs, ranks: Sequence[Facts], union: CPUs) -> Finding | None:
    """Judge ranks that may run on the same CPUs and no others."""
    wanted, cores, first = sum(rank.processors.threads for rank in ranks), ranks[0].processors.cores, ranks[0]
    allotted = _number(first.environment.get("SLURM_CPUS_ON_NODE", "")) or first.processors.node_cpus
    where = f"CPU{'s' if len(cpus) > 1 else ''} {ranges(cpus)}"
    if wanted <= cores:
        return None
    if wanted <= len(cpus):
        found = f"{_count(ranks)} on {where}, which are {cores} cores: some share one"
        return _finding(WARNING, ranks, found, f"as many threads as cores: {_FEWER}")
    if len(union) < allotted:
        found = f"{_count(ranks)} pinned to {where}, while {allotted - len(union)} CPUs of the node have no rank"
        return _finding(ERROR, ranks, f"{found}: {wanted / len(cpus):.0f} times slower", _UNPIN)
    return _finding(WARNING, ranks, f"{_count(ranks)} on {where}: they take turns", _FEWER)


def _overlaps(groups: dict[CPUs, list[Facts]]) -> list[Finding]:
    """Masks that differ, but have CPUs in common."""
    shared: dict[int, list[Facts]] = defaultdict(list)
    for cpus, ranks in groups.items():
        for cpu in cpus:
            shared[cpu] += ranks
    both = {cpu for cpu, ranks in shared.items() if len(ranks) > len(groups[frozenset(ranks[0].processors.cpus)])}
    if not both:
        return []
    ranks = sorted({rank.rank: rank for cpu in both for rank in shared[cpu]}.values(), key=lambda fact: fact.rank)
    return [_finding(WARNING, ranks, f"masks of ranks overlap on CPUs {ranges(both)}: threads may meet there", _UNPIN)]


def _openmp(groups: dict[CPUs, list[Facts]]) -> list[Finding]:
    """OpenMP's own binding counts from the first CPU of the mask, in every rank."""
    findings = []
    for ranks in groups.values():
        names = [name for name in _OPENMP if ranks[0].environment.get(name, "false").lower() != "false"]
        if names and len(ranks) > 1:
            found = f"${names[0]} puts the threads of {len(ranks)} ranks on the same CPUs"
            hint = f"unset {' '.join(names)}, or let the launcher bind the ranks"
            findings.append(_finding(ERROR, ranks, found, hint))
    return findings


def _idle(facts: Sequence[Facts], union: CPUs, wanted: int) -> list[Finding]:
    """More than half of the cores without a thread."""
    by_mask = {fact.processors.cpus: fact.processors.cores for fact in facts}
    cores = min(sum(by_mask.values()), len(union))
    if wanted * 2 > cores:
        return []
    found = f"{_count(facts)}: {cores - wanted} of {cores} cores have nothing to do"
    return [_finding(WARNING, facts, found, f"more ranks, or OMP_NUM_THREADS={cores // len(facts)}")]


def _count(ranks: Sequence[Facts]) -> str:
    threads = sorted({rank.processors.threads for rank in ranks})
    plural = "s" if threads[-1] > 1 else ""
    numbers = str(threads[0]) if len(threads) == 1 else f"{threads[0]} to {threads[-1]}"
    return f"{len(ranks)} rank{'s' if len(ranks) > 1 else ''} of {numbers} thread{plural}"


def _finding(level: str, facts: Sequence[Facts], found: str, hint: str = "") -> Finding:
    return Finding(level, "cores", found, hint, tuple(fact.rank for fact in facts))


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0
