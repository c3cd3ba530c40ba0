"""Findings about file systems: model, output, caches; what one node writes, do the others see it?"""

from collections.abc import Sequence
from typing import NamedTuple

from hpcinfer.diagnosis.facts import Facts
from hpcinfer.diagnosis.finding import ERROR, OK, WARNING, Finding
from hpcinfer.diagnosis.places import Place
from hpcinfer.units import format_bytes

NETWORK = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "afs", "panfs", "pvfs2", "orangefs", "9p",
           "virtiofs", "wekafs", "glusterfs", "fuse.", "daos")  # fmt: skip  # how their types begin
_IMAGES = ("fuse.squashfuse", "fuse.fuse-overlayfs")  # of containers
MEMORY = ("tmpfs", "ramfs")
_LEAST_BYTES, _FEW_BYTES, _FEW_FILES = 64 << 20, 1 << 30, 1000
_SLOW_SYNC_S = 1.0  # rows are made durable every 5 s
_LATE_S = 2.0
_MANY_RANKS = 256  # that import Python from one server
_WRITTEN = ("output", "store")
_ELSEWHERE = "put the output on another file system"


class Shared(NamedTuple):
    """What the first rank of a node saw of files that other nodes had made in the output's directory."""

    problem: str = ""  # what it did not see
    delay_s: float = 0.0  # until it saw what had been appended
    exclusive: bool = False  # it made a file that all wanted to make
    linked: bool = False  # it made a link that all wanted to make


def check_files(facts: Sequence[Facts]) -> list[Finding]:
    """Judge the file systems that each node sees.

    Args:
        facts: of all ranks; those that looked at files speak for their nodes.
    """
    places = [finding for fact in facts for place in fact.places for finding in _check_place(place, fact, len(facts))]
    return [*places, *_check_same_model(facts), *(finding for fact in facts for finding in _check_trial(fact))]


def check_shared(seen: dict[int, Shared]) -> list[Finding]:
    """Judge what the nodes saw of each other's files.

    Args:
        seen: by rank, of the first rank of each node.
    """
    if len(seen) < 2:
        return []
    findings = [Finding(ERROR, "output", f"what rank 0 writes there is not seen here: {shared.problem}",
                        "a file system that all nodes share", (rank,))
                for rank, shared in seen.items() if shared.problem]  # fmt: skip
    if findings:
        return findings
    count, slowest = len(seen), max(shared.delay_s for shared in seen.values())
    winners = {"O_EXCL": sum(shared.exclusive for shared in seen.values()),
               "hard links": sum(shared.linked for shared in seen.values())}  # fmt: skip
    findings = [Finding(ERROR, "output", f"{won} of {count} nodes won one name by {what}: exactly one must", _ELSEWHERE)
                for what, won in winners.items() if won != 1]  # fmt: skip
    if slowest > _LATE_S:
        findings.append(Finding(WARNING, "output", f"other nodes see what is appended after {slowest:.1f} s",
                                "`hpcinfer status` elsewhere lags by as much, results do not"))  # fmt: skip
    found = f"{count} nodes see each other's files, after {slowest:.3f} s at most"
    return findings or [Finding(OK, "output", found)]


def is_network(kind: str) -> bool:
    """Whether a type of file system lies behind a network."""
    return kind.lower().startswith(NETWORK) and not kind.startswith(_IMAGES)


def _check_place(place: Place, fact: Facts, num_ranks: int) -> list[Finding]:
    ranks, where = (fact.rank,), f"{place.path} ({place.mount.kind})"
    if place.problem:
        level = ERROR if place.use in ("model", *_WRITTEN) else WARNING
        found = place.problem if place.path in place.problem else f"{where}: {place.problem}"
        return [Finding(level, place.use, found, _remedy(place.problem), ranks)]
    if place.use in _WRITTEN:
        return [Finding(*each, ranks) for each in _written(place, where)]
    level, note, hint = _read(place, bool(fact.devices.node_gpus), num_ranks)
    return [Finding(level, place.use, f"{where}{note}", hint, ranks)] if note or place.use == "model" else []


def _remedy(problem: str) -> str:
    if "no answer" in problem:
        return "is the file server well? `df` hangs there, too"
    return "the same path on all nodes, mounted and permitted there"


def _written(place: Place, where: str) -> list[tuple[str, str, str, str]]:
    """Level, use, text and hint of each finding about a place where the job writes."""
    free, needed = place.free_bytes, max(place.needed_bytes, _LEAST_BYTES)
    room = format_bytes(free) if free >= 0 else "room unknown"
    rules = (
        (place.mount.is_read_only, ERROR, "is mounted read-only", _ELSEWHERE),
        (0 <= free < needed, ERROR, f"has {room} free, {format_bytes(needed)} are needed", "make room"),
        (needed <= free < _FEW_BYTES, WARNING, f"has only {room} free", "make room; a full disk loses no row"),
        (0 <= place.free_files < _FEW_FILES, WARNING, f"takes {place.free_files} more files", "remove some"),
        (bool(place.quota), WARNING, f"is over quota: {place.quota}", "make room; see `quota`"),
        (place.mount.kind in MEMORY, WARNING, "is memory, and gone with the node", "copy the output away in the job"),
    )
    found = [(level, place.use, f"{where} {text}", hint) for is_so, level, text, hint in rules if is_so]
    return found or [(OK, place.use, f"{where}, {room} free", "")]


def _read(place: Place, has_gpus: bool, num_ranks: int) -> tuple[str, str, str]:
    """Level, note and hint about a place that the job reads, or that tools write; no note where all is well."""
    is_far, is_full = is_network(place.mount.kind), 0 <= place.free_bytes < _LEAST_BYTES
    if place.use == "model":
        return OK, ", read in large pieces, never mapped" if is_far else "", ""
    if place.use == "temporary files":
        note = ": MPI keeps its session there" if is_far else ""
        note += f": {format_bytes(place.free_bytes)} free" if is_full else ""
        return WARNING, note, "export TMPDIR=/tmp, or another folder of the node"
    if place.use == "Python":
        note = f": {num_ranks} ranks import from one server, which takes long"
        return WARNING, note if is_far and num_ranks >= _MANY_RANKS else "", "an image, or a copy on each node's disk"
    note = ": compilers at run time (Triton, torch.compile) race there and lose files" if is_far else ""
    return WARNING if has_gpus else OK, note, "export TRITON_CACHE_DIR=/tmp/triton-$SLURM_JOB_ID"


def _check_same_model(facts: Sequence[Facts]) -> list[Finding]:
    seen = {fact.rank: place.identity for fact in facts for place in fact.places if place.identity}
    first = next(iter(seen.values()), "")
    ranks = tuple(rank for rank, identity in seen.items() if identity != first)
    hint = "one path on a shared file system, or equal copies"
    return [Finding(ERROR, "model", "other files than on the first node", hint, ranks)] if ranks else []


def _check_trial(fact: Facts) -> list[Finding]:
    if fact.trial is None:
        return []
    ranks, trial = (fact.rank,), fact.trial
    findings = [Finding(ERROR, "output", f"{operation} does not work there: {text}", _ELSEWHERE, ranks)
                for operation, text in trial.problems.items()]  # fmt: skip
    if trial.sync_s > _SLOW_SYNC_S:
        hint = "a loaded file server: finished rows wait for it"
        findings.append(Finding(WARNING, "output", f"a durable write takes {trial.sync_s:.0f} s", hint, ranks))
    if abs(trial.clock_offset_s) > _LATE_S:
        found = f"its file server's clock is {trial.clock_offset_s:+.0f} s from this node's"
        findings.append(Finding(WARNING, "clocks", found, "results do not depend on it, times in logs do", ranks))
    works = Finding(OK, "output", "append, hard link, O_EXCL, fsync, mmap and rename work", ranks=ranks)
    return findings or [works]
