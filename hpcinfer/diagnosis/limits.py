"""Findings about limits of processes, and about shared memory."""

from collections import defaultdict
from collections.abc import Sequence

from hpcinfer.diagnosis.facts import Facts
from hpcinfer.diagnosis.finding import ERROR, OK, WARNING, Finding
from hpcinfer.diagnosis.node import Limit
from hpcinfer.units import format_bytes

_FILES, _FILES_PER_RANK = 256, 2  # open files of a rank by itself, and for each rank that it may talk to by TCP
_SEGMENT_BYTES = 32 << 20  # of shared memory per rank: Open MPI's sm takes 16 MiB and what large messages need
_LOCKED_BYTES = 64 << 20  # an adapter registers at least this much
_NONE = Limit(-1, -1)


def check_limits(facts: Sequence[Facts]) -> list[Finding]:
    """Judge the limits of every rank, and the shared memory of every node."""
    local: dict[tuple[str, str], list[Facts]] = defaultdict(list)
    for fact in facts:
        local[fact.machine, fact.host].append(fact)
    findings = [finding for fact in facts for finding in _check_rank(fact)]
    findings = findings or [Finding(OK, "limits", f"{_files(facts[0])} open files, no limit that a job would meet")]
    return findings + [finding for ranks in local.values() for finding in _check_shared_memory(ranks)]


def _check_rank(fact: Facts) -> list[Finding]:
    found = [_open_files(fact), _processes(fact), _locked(fact)]
    found += [
        _finite(fact, "AS", "virtual memory is limited to {}: libraries and mapped files count", "ulimit -v unlimited"),
        _finite(fact, "FSIZE", "files end at {}: the output may be larger", "ulimit -f unlimited"),
    ]
    seconds = fact.limits.get("CPU", _NONE).soft
    if seconds >= 0:
        text = f"the system ends this process after {seconds} s of CPU time, as login nodes do"
        found.append(Finding(WARNING, "limits", text, "ulimit -t unlimited, or a compute node", (fact.rank,)))
    return [finding for finding in found if finding]


def _open_files(fact: Facts) -> Finding | None:
    limit, needed = fact.limits.get("NOFILE", _NONE), _FILES + _FILES_PER_RANK * fact.world_size
    if limit.soft < 0 or limit.soft >= needed:
        return None
    can_raise = limit.hard < 0 or limit.hard >= needed
    hint = f"ulimit -n {needed}" if can_raise else f"ask the site: the hard limit is {limit.hard}"
    found = f"{limit.soft} open files, {needed} may be needed with {fact.world_size} ranks"
    return Finding(ERROR if limit.soft < _FILES // 2 else WARNING, "limits", found, hint, (fact.rank,))


def _processes(fact: Facts) -> Finding | None:
    limit, needed = fact.limits.get("NPROC", _NONE).soft, fact.launch.local_size * (fact.processors.threads + 8)
    if limit < 0 or limit >= 2 * needed:
        return None
    found = f"{limit} processes and threads of this user, the job takes about {needed} on a node"
    return Finding(WARNING, "limits", found, f"ulimit -u {4 * needed}", (fact.rank,))


def _locked(fact: Facts) -> Finding | None:
    limit = fact.limits.get("MEMLOCK", _NONE).soft
    if not fact.devices.fabrics or not 0 <= limit < _LOCKED_BYTES:
        return None
    found = f"{format_bytes(limit)} of memory may be locked: {fact.devices.fabrics[0]} needs more, or TCP is used"
    hint = "ulimit -l unlimited; where Slurm passes limits on, on the login node"
    return Finding(WARNING, "limits", found, hint, (fact.rank,))


def _finite(fact: Facts, name: str, text: str, hint: str) -> Finding | None:
    limit = fact.limits.get(name, _NONE).soft
    return Finding(WARNING, "limits", text.format(format_bytes(limit)), hint, (fact.rank,)) if limit >= 0 else None


def _files(fact: Facts) -> str:
    soft = fact.limits.get("NOFILE", _NONE).soft
    return "any number of" if soft < 0 else str(soft)


def _check_shared_memory(facts: Sequence[Facts]) -> list[Finding]:
    """Judge one node."""
    ranks, memory = tuple(fact.rank for fact in facts), facts[0].shared_memory
    if len(facts) == 1:
        return []
    if len({fact.shared_memory.device for fact in facts}) > 1:
        found = f"ranks of one node see different {memory.path}: their messages cannot go through memory"
        hint = "one container per node, or containers that share it (--ipc=host)"
        return [Finding(WARNING, "shared memory", found, hint, ranks)]
    if memory.free_bytes < 0:
        found = f"no {memory.path}: messages between ranks of a node take a detour"
        return [Finding(WARNING, "shared memory", found, "mount a tmpfs there, or bind it into the container", ranks)]
    needed = _SEGMENT_BYTES * len(facts)
    if memory.free_bytes < needed:
        found = f"{memory.path} has {format_bytes(memory.free_bytes)} free, MPI may need {format_bytes(needed)} for"
        found += f" {len(facts)} ranks: one dies with SIGBUS then"
        hint = "docker run --shm-size, a larger tmpfs, or OMPI_MCA_btl=self,tcp"
        return [Finding(ERROR, "shared memory", found, hint, ranks)]
    return [Finding(OK, "shared memory", f"{memory.path} has room", ranks=ranks)]
