"""The autopsy of a hang: who waits and where, who is missing, and what is done about it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hpcinfer.recovery.hangs.standstill import Kind
from hpcinfer.recovery.leases import Holder, incarnation_name
from hpcinfer.report.slow_ranks import Pace
from hpcinfer.units import format_seconds

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

_MAX_FRAMES = 12  # of a stack in the log; the files have all


@dataclass(frozen=True)
class Roster:
    """The ranks that watch each other."""

    name: str  # of this MPI job
    rank: int  # this one
    holders: tuple[Holder, ...]  # by rank

    def where(self, rank: int) -> str:
        """Name a rank."""
        holder = self.holders[rank]
        return f"rank {rank}/{len(self.holders)} on {holder.host} (pid {holder.pid})"

    def share_host(self, one: int, other: int) -> bool:
        """Whether two ranks can see each other's processes."""
        first, second = (self.holders[rank] for rank in (one, other))
        return bool(first.boot_id) and (first.boot_id, first.pid_namespace) == (second.boot_id, second.pid_namespace)

    def neighbours(self) -> list[int]:
        """Other ranks of this host."""
        return [rank for rank in range(len(self.holders)) if rank != self.rank and self.share_host(rank, self.rank)]


@dataclass(frozen=True)
class Answer:
    """What a rank says when somebody asks who still moves."""

    rank: int
    kind: Kind
    place: str = ""  # phase, or name of the thread that is stuck
    still_s: float = 0.0
    age_s: float = 0.0  # of the inquiry when this was said
    stack: tuple[str, ...] = ()  # of that thread, innermost first
    threads: dict[str, list[str]] = field(default_factory=dict)  # stacks of all
    gone: tuple[int, ...] = ()  # ranks of its host whose processes have ended
    pace: Pace | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Answer:
        """Inverse of `to_dict`."""
        pace = values["pace"]
        return Answer(**{**values, "kind": Kind(values["kind"]), "stack": tuple(values["stack"]),
                         "gone": tuple(values["gone"]), "pace": pace and Pace(*pace)})  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What all ranks do now."""

    missing: dict[int, int | None] = field(default_factory=dict)  # rank -> rank that can end it, if any
    is_deadlock: bool = False  # all wait for each other
    must_end: bool = False  # the whole MPI job
    report: str = ""

    @property
    def is_hang(self) -> bool:
        """Whether anything is wrong."""
        return bool(self.missing) or self.is_deadlock

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Verdict:
        """Inverse of `to_dict`."""
        return Verdict(**{**values, "missing": {int(rank): killer for rank, killer in values["missing"].items()}})


def judge(
    roster: Roster, answers: Mapping[int, Answer], lost: Iterable[int], *, can_lose_ranks: bool
) -> Verdict:
    """Find out who is missing.

    Not collective.

    Args:
        roster: all ranks.
        answers: of those that answered.
        lost: ranks known to have died.
        can_lose_ranks: whether the others can go on without the missing ones.
    """
    gone = {*lost, *(rank for answer in answers.values() for rank in answer.gone)}
    expected = [rank for rank in range(len(roster.holders)) if rank not in gone]
    kinds = {rank: answers[rank].kind for rank in expected if rank in answers}
    missing = [rank for rank in expected if kinds.get(rank, Kind.STUCK) is Kind.STUCK]
    if not missing:
        is_deadlock = Kind.WAITING in kinds.values() and set(kinds.values()) <= {Kind.WAITING, Kind.SPARE}
        return Verdict(is_deadlock=is_deadlock, must_end=is_deadlock)
    healthy = [rank for rank in kinds if rank not in missing]
    killers = {rank: _killer(roster, rank, healthy, has_answered=rank in kinds) for rank in missing}
    is_lost = None in killers.values() or len(missing) > len(healthy)
    return Verdict(killers, must_end=is_lost or not can_lose_ranks)


def collector(answers: Mapping[int, Answer]) -> int:
    """Choose the rank that draws up the report: the lowest that waits, else the lowest that moves, else the lowest."""
    waiting = [rank for rank, answer in answers.items() if answer.kind not in (Kind.MOVING, Kind.STUCK)]
    moving = [rank for rank, answer in answers.items() if answer.kind is Kind.MOVING]
    return min(waiting or moving or answers, default=-1)


def write_report(
    roster: Roster, verdict: Verdict, answers: Iterable[Answer], evidence: Mapping[int, str], age_s: float
) -> str:
    """Put into words who is missing and who waits where; ranks with the same stack are one paragraph.

    Not collective.

    Args:
        roster: all ranks.
        verdict: what was found.
        answers: of those that answered.
        evidence: what was seen of those that did not.
        age_s: of the inquiry.
    """
    later = [replace(answer, still_s=answer.still_s + age_s - answer.age_s) for answer in answers]
    standing = [answer for answer in later if answer.kind not in (Kind.MOVING, Kind.SPARE)]
    lines = [_headline(roster, verdict, max((answer.still_s for answer in standing), default=age_s))]
    silent = verdict.missing.keys() - {answer.rank for answer in later}
    for rank in sorted(silent):
        seen = evidence.get(rank, "its state is unknown")
        lines.append(f"  missing: {roster.where(rank)}: gives no sign of life; {seen}")
    return "\n".join([*lines, *_paragraphs(roster, standing)])


def _headline(roster: Roster, verdict: Verdict, since_s: float) -> str:
    missing = ", ".join(roster.where(rank) for rank in verdict.missing)
    parts = [f"hang: no progress for {format_seconds(since_s)}"]
    parts += [f"missing, treated as dead: {missing}" if missing else "all ranks wait for each other"]
    return "; ".join([*parts, *["the MPI job ends"] * verdict.must_end])


def _paragraphs(roster: Roster, answers: Sequence[Answer]) -> list[str]:
    groups: dict[tuple[Kind, str, tuple[str, ...]], list[Answer]] = {}
    for answer in sorted(answers, key=lambda answer: (answer.kind is not Kind.STUCK, answer.rank)):
        groups.setdefault((answer.kind, answer.place, answer.stack), []).append(answer)
    lines = []
    for (kind, place, stack), (first, *others) in groups.items():
        more = f" and {len(others)} more ({_ranges([each.rank for each in others])})" if others else ""
        since = format_seconds(max(each.still_s for each in (first, *others)))
        where = f"{roster.where(first.rank)}{more}"
        lines.append(f"  {kind.value}: {where}: in {place or 'no phase'!r} for {since}, at")
        lines += [f"    {frame}" for frame in stack[:_MAX_FRAMES]]
    return lines


def _killer(roster: Roster, rank: int, healthy: Sequence[int], *, has_answered: bool) -> int | None:
    """The rank that can end another one: the lowest healthy one on its host, else itself if it still listens."""
    near = [other for other in healthy if roster.share_host(rank, other)]
    return min(near, default=rank if has_answered else None)


def _ranges(ranks: Sequence[int]) -> str:
    """Write 1, 2, 3, 7 as 1-3,7."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def exchange_roster(world: Collectives) -> Roster:
    """Tell all ranks who they are, and agree on a name that no other MPI job has.

    Collective over the world.
    """
    own = json.dumps([incarnation_name(), asdict(Holder.this_process())]).encode()
    said = [json.loads(data) for data in world.all_gather_bytes(own)]
    return Roster(said[0][0], world.rank, tuple(Holder(**holder) for _, holder in said))
