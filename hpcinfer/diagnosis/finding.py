"""A finding: one line that says how bad it is, what was found and means, and what to do."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

OK, WARNING, ERROR = "ok", "warning", "error"
_MOST_RUNS = 12  # that a line names; JSON has all


class Finding(NamedTuple):
    """One finding, of some ranks or of all."""

    level: str
    check: str  # what was looked at, in a word or two
    found: str  # and what it means
    hint: str = ""
    ranks: tuple[int, ...] = ()  # () is the whole job


def fold(findings: Iterable[Finding]) -> list[Finding]:
    """Join equal findings of several ranks; the order is that of the first of each."""
    ranks: dict[Finding, set[int]] = {}
    for finding in findings:
        ranks.setdefault(finding._replace(ranks=()), set()).update(finding.ranks)
    return [finding._replace(ranks=tuple(sorted(those))) for finding, those in ranks.items()]


def render(finding: Finding, hosts: Mapping[int, str]) -> str:
    """Write a finding as one line.

    Args:
        finding: what to write.
        hosts: the host of every rank of the job.
    """
    names = sorted({hosts[rank] for rank in finding.ranks if rank in hosts})
    where = f" on {host_ranges(names)}" if names else ""
    is_all = len(finding.ranks) >= len(hosts)
    who = "" if is_all or not finding.ranks else f"{rank_ranges(finding.ranks)}{where}: "
    hint = f"; hint: {finding.hint}" if finding.hint else ""
    text = " ".join(f"{who}{finding.found}{hint}".split())  # one line, whatever a library has said
    return f"{finding.level:<8} {finding.check:<13} {text}"


def rank_ranges(ranks: Sequence[int]) -> str:
    """Write ranks as "rank 3" or "ranks 0-3,7"; of many runs only the first ones."""
    runs = ranges(ranks).split(",")
    more = f" ... ({len(ranks)} ranks)" if len(runs) > _MOST_RUNS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {','.join(runs[:_MOST_RUNS])}{more}"


def ranges(numbers: Iterable[int]) -> str:
    """Write numbers as 0-3,7."""
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in _runs(sorted(set(numbers))))


def host_ranges(hosts: Iterable[str]) -> str:
    """Write host names as node[01-04,07], as Slurm does; a name without a number at its end stays as it is."""
    families: dict[tuple[str, int, str], list[int]] = {}
    for host in sorted(set(hosts)):
        match = re.fullmatch(r"([^.]*?)(\d+)(\..*)?", host)
        key = (match[1], len(match[2]), match[3] or "") if match else (host, 0, "")
        families.setdefault(key, []).append(int(match[2]) if match else 0)
    return ",".join(_family(*key, numbers) for key, numbers in families.items())


def _family(prefix: str, width: int, suffix: str, numbers: list[int]) -> str:
    if not width:
        return prefix
    parts = [f"{first:0{width}}-{last:0{width}}" if last > first else f"{first:0{width}}"
             for first, last in _runs(sorted(numbers))]
    text = ",".join(parts[:_MOST_RUNS]) + (" ..." if len(parts) > _MOST_RUNS else "")
    return f"{prefix}[{text}]{suffix}" if len(numbers) > 1 else f"{prefix}{text}{suffix}"


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of neighbours."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs
