"""Who claims and deals for an MPI job: the rank of the latest term. A term is a file that can be linked only once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from hpcinfer.recovery.durable import publish_bytes


class Term(NamedTuple):
    """One claimant's time."""

    number: int
    rank: int  # of the world
    lease: str  # in whose name it claims


class Election:
    """The terms of one MPI job, as this rank knows them."""

    def __init__(self, directory: Path, job_name: str, first_rank: int) -> None:
        """Begin with the term that needs no election.

        Args:
            directory: of all jobs' terms.
            job_name: no other MPI job has it.
            first_rank: the first claimant.
        """
        self._directory, self._job_name = directory, job_name
        self.term = Term(0, first_rank, "")

    def stand(self, rank: int, lease: str) -> bool:
        """Try to begin the term after the last one that this rank knows; says whether it is ours. Not collective."""
        is_ours = self._publish(Term(self.term.number + 1, rank, lease))
        self.follow()
        return is_ours

    def begin(self, lease: str) -> None:
        """Begin the first term, on the first claimant: leave word of the lease. Not collective."""
        self._publish(self.term._replace(lease=lease))

    def follow(self) -> Term:
        """Learn of terms that have begun. Not collective."""
        while (term := self._read(self.term.number + 1)) is not None:
            self.term = term
        return self.term

    def former_leases(self) -> list[str]:
        """Leases of all claimants before this term. Not collective."""
        terms = (self._read(number) for number in range(self.term.number))
        return [term.lease for term in terms if term is not None]

    def _publish(self, term: Term) -> bool:
        self._directory.mkdir(exist_ok=True)
        return publish_bytes(self._path(term.number), json.dumps(term).encode(), sync=False)

    def _read(self, number: int) -> Term | None:
        try:
            return Term(*json.loads(self._path(number).read_bytes()))
        except FileNotFoundError:
            return None

    def _path(self, number: int) -> Path:
        return self._directory / f"{self._job_name}.{number}"
