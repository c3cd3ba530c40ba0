"""What the supervisor's loop works with: its rules, a replica, and what it asks of the world."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from hpcinfer.supervision.nodes import Placement
from hpcinfer.supervision.step import Step


class Outcome(enum.Enum):
    """How the loop ended."""

    COMPLETE = "every row is finished"
    STOPPED = "stopped early"
    REFUSED = "the steps refuse this job"
    FAILED = "no replica can go on"


class Burial(NamedTuple):
    """What a dead step had done."""

    num_finished: int  # rows, errors not among them
    is_rows_fault: bool  # a row that was alone has crashed it: that says nothing of the node


class Watch(Protocol):
    """What the loop asks of the job directory; see `hpcinfer.supervision.job_watch`."""

    def is_open(self) -> bool:
        """Whether a step has got so far that others find the index."""

    def is_complete(self) -> bool:
        """Whether every row is finished."""

    def is_silent(self, step: str) -> bool:
        """Whether a step has shown no sign of life for too long."""

    def num_in_flight(self, step: str) -> int | None:
        """Rows that a step computes now; None if it has not begun."""

    def bury(self, step: str, exit_code: int, *, is_node_lost: bool) -> Burial:
        """Clean up after a dead step."""


class Cluster(Protocol):
    """What the loop asks of the scheduler; see `hpcinfer.supervision.slurm`."""

    def down(self, names: Sequence[str]) -> set[str]:
        """Which of these nodes cannot run steps now."""

    def shrink(self, kept: Iterable[str]) -> bool:
        """Give all nodes but these back."""


@dataclass(frozen=True)
class Rules:
    """How long and how often."""

    num_replicas: int
    ranks: int  # of a replica
    restarts: int  # of a replica in a row, without a finished row
    backoff_s: float  # before the first of them
    grace_s: float  # for steps to put their work away
    gives_back: bool = False  # nodes without work
    kept_node: str = ""  # where this process runs: never given back
    retries_errors: bool = False  # the first step opens the retry, the others join


class Replica:
    """A place for a step, and what has become of those before."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.step: Step | None = None
        self.name = ""
        self.placement: Placement = ()
        self.num_starts = self.num_failures = 0  # failures in a row
        self.not_before = 0.0
        self.is_over = False  # no step is started here any more
        self.is_sent_home = False
        self.silent_since: float | None = None
        self.idle_since: float | None = None
