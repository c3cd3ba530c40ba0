"""All contenders in turn, round after round, with the roofline measured in between."""

import hashlib
import sys
from collections import defaultdict
from typing import NamedTuple

from breakdown import breakdown
from contenders import Contender, JobContender, PeerContender
from engines import Bench, JobResult, PeerResult
from roofline import Peaks


class Run(NamedTuple):
    """What one run of a contender took."""

    seconds: float
    peak_bytes: int


class Rounds:
    """Runs all contenders and keeps what came of it."""

    def __init__(self, bench: Bench, jobs: list[JobContender], peers: list[PeerContender]) -> None:
        self._bench, self._jobs, self._peers = bench, jobs, peers
        self.runs: dict[Contender, list[Run]] = defaultdict(list)
        self.peaks: list[dict[int, Peaks]] = []  # by threads: before the first round, then after each
        self.digests: dict[str, set[str]] = defaultdict(set)  # of outputs, by what must be equal
        self.versions: dict[str, str] = {}
        self.reference: PeerResult | None = None  # the first one of transformers
        self.float32_job: JobResult | None = None  # the latest one with the defaults of the kernels
        self.breakdowns: dict[JobContender, dict[str, float]] = {}

    def run_round(self) -> None:
        """Run each contender once; those with equally many threads are neighbours."""
        if not self.peaks:
            self._measure_roofline()
        contenders: list[Contender] = [*self._peers, *self._jobs]
        if len(self.peaks) % 2 == 0:  # every other round begins with the jobs
            contenders.reverse()
        for contender in sorted(contenders, key=lambda one: one.threads):
            result = self._run_job(contender) if isinstance(contender, JobContender) else self._run_peer(contender)
            self.runs[contender].append(Run(result.seconds, result.peak_bytes))
            what = f"{contender.engine}, {contender.precision}, {contender.threads} threads"
            print(f"{what}: {result.seconds:.2f} s", file=sys.stderr, flush=True)
        self._measure_roofline()

    def run_timed(self) -> None:
        """Run each job once more with stopwatches inside."""
        for contender in self._jobs:
            self.breakdowns[contender] = breakdown(self._run_job(contender, is_timed=True))

    def _run_job(self, contender: JobContender, *, is_timed: bool = False) -> JobResult:
        result = self._bench.run_job(contender, is_timed=is_timed)
        self.digests[contender.answer].add(hashlib.sha256(result.output).hexdigest())
        if contender.answer == "f32":
            self.float32_job = result
        return result

    def _run_peer(self, contender: PeerContender) -> PeerResult:
        is_reference = contender.peer == "transformers" and self.reference is None
        result = self._bench.run_peer(contender, with_margins=is_reference and self._bench.workload.temperature == 0)
        if is_reference:
            self.reference = result
        self.versions.update(result.versions)
        return result

    def _measure_roofline(self) -> None:
        threads = sorted({job.threads for job in self._jobs})  # no peer has another number
        self.peaks.append(self._bench.measure_roofline(threads))
