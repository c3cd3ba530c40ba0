"""One round: a job directory, the jobs that work on it one after another, and what is done to them."""

import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from chaos_journal import JournalWatch
from chaos_places import Launch, Places
from chaos_processes import Process, RunningJob
from contenders import Mesh

from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.merging import read_complete

_LIMIT_S = 90.0  # without a new durable row
_MAX_STARTS = 6
_ORPHANS_S = 5.0  # ranks without a launcher should end by themselves
_JITTER_S = {"start": 0.5, "loading": 0.05, "prefill": 0.05, "decode": 0.1, "merge": 0.03}
_SIZES = [Mesh(dp, pp, tp) for dp in (1, 2, 3, 4) for pp in (1, 2, 3, 4) for tp in (1, 2, 3, 4)]
MAX_RANKS = 4
MESHES = [mesh for mesh in _SIZES if mesh.ranks <= MAX_RANKS]


def num_claims(paths: JobPaths) -> int:
    """Count blocks of rows that somebody has begun; they show best how far a job is."""
    return sum(1 for _ in paths.claims.glob("*/*.g1"))


@dataclass(frozen=True)
class Workload:
    """What every job computes, and what comes out when nobody disturbs it."""

    model: Path
    prompts: Path
    output: bytes
    tokens: tuple[int, ...]  # output tokens of each row
    num_blocks: int


class Fault(NamedTuple):
    """Something that was done to a job."""

    time: float  # of the clock
    what: str
    moment: str


class Start(NamedTuple):
    """One start of the command, and how it ended."""

    mesh: str
    exit_code: int | None  # None: it had to be killed
    seconds: float


@dataclass
class Scene:
    """A round while it runs."""

    workload: Workload
    places: Places
    launch: Launch
    mesh: Mesh
    options: list[str]
    rng: random.Random
    folder: Path
    faults: list[Fault] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    damaged: set[int] = field(default_factory=set)  # rows whose durable lines somebody has damaged
    problems: list[str] = field(default_factory=list)
    moment: str = ""

    def __post_init__(self) -> None:
        self.paths = JobPaths(self.folder / "out.jsonl")
        self.journal = JournalWatch(self.paths, self.workload.tokens)
        self.jobs: list[RunningJob] = []
        self.begin = time.time()

    @property
    def job(self) -> RunningJob:
        """The latest one."""
        return self.jobs[-1]

    @property
    def is_complete(self) -> bool:
        """Whether a merge has written the output."""
        return read_complete(self.paths) is not None

    def start(self) -> None:
        """Start the command, as a user would."""
        paths = ["--model", self.workload.model, "--input", self.workload.prompts, "--output", self.paths.output]
        argv = self.launch.argv(self.mesh, [*map(str, paths), *self.options])
        log = self.folder / f"start-{len(self.jobs)}.log"
        self.jobs.append(RunningJob(argv, self.places.variables(self.launch), log))

    def wait_for(self, moment: str) -> bool:
        """Wait until the job is there, and a bit longer; whether it is still running."""
        self.moment = moment
        fraction, end = self.rng.uniform(0.05, 0.9), time.monotonic() + _LIMIT_S
        while self.job.is_running and time.monotonic() < end and not self._has_reached(moment, fraction):
            time.sleep(0.002)
        time.sleep(self.rng.uniform(0, _JITTER_S[moment]))
        return self.job.is_running

    def _has_reached(self, moment: str, fraction: float) -> bool:
        if moment == "loading":
            return self.job.log.stat().st_size > 0  # all ranks have found the model and go on to load it
        if moment == "prefill":
            return num_claims(self.paths) > 0
        if moment == "decode":
            return num_claims(self.paths) > fraction * self.workload.num_blocks
        return moment == "start" or self.journal.num_finished == len(self.workload.tokens)

    def choose_rank(self) -> Process | None:
        """Choose one of the living ranks of the latest job."""
        ranks = self.job.ranks()
        return self.rng.choice(ranks) if ranks else None

    def signal(self, process: Process | None, number: int, what: str) -> None:
        """Send a signal, which is a fault if it reaches somebody."""
        self.journal.look()
        now = time.time()
        if process is not None and process.send(number):
            self.note(what, now)

    def note(self, what: str, when: float | None = None) -> None:
        """Write down a fault."""
        self.faults.append(Fault(when or time.time(), what, "too late" if self.is_complete else self.moment))

    def finish(self) -> None:
        """Wait for the job; start it again until the output is there."""
        while True:
            self._end_start()
            if self.is_complete or len(self.starts) >= _MAX_STARTS:
                break
            if self.rng.random() < 0.5 and not self.launch.on_hosts:
                self.mesh = self.rng.choice(MESHES)
            self.start()
        self._bury()
        if not self.is_complete:
            self.problems.append(f"no output after {_MAX_STARTS} starts")

    def _end_start(self) -> None:
        job = self.job
        exit_code = self._wait(job)
        self.starts.append(Start(str(self.mesh), exit_code, time.monotonic() - job.start))
        if exit_code is None:
            self.problems.append(f"start {len(self.starts)} stood still for {_LIMIT_S:.0f} s")
            job.end()
        elif not self.launch.is_supervised:  # the steps of a supervisor that was killed are the next one's business
            self._bury()

    def _wait(self, job: RunningJob) -> int | None:
        """Wait for a command to end, or to stand still."""
        num_finished, last = -1, time.monotonic()
        while (exit_code := job.wait(0.1)) is None and time.monotonic() - last < _LIMIT_S:
            if num_finished != (num_finished := self.journal.num_finished):
                last = time.monotonic()
        return exit_code

    def _bury(self) -> None:
        """Ranks should end by themselves when their launcher has; say so if they did not."""
        end = time.monotonic() + _ORPHANS_S
        while time.monotonic() < end and any(job.ranks() for job in self.jobs):
            time.sleep(0.02)
        if left := sum(job.end() for job in self.jobs):
            self.problems.append(f"{left} ranks outlived start {len(self.starts)}")

    def close(self) -> None:
        """Leave no process and no thread behind."""
        for job in self.jobs:
            job.end()
        self.journal.close()
