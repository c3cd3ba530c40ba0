"""What the runs of a study came to: medians, efficiency against the ideal of the cores at hand, losses."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

from hpcinfer.report.rates import rates_of
from hpcinfer.scaling.cores import Cores
from hpcinfer.scaling.fit import Fit, fit
from hpcinfer.scaling.losses import COMPUTING, SHARES, rank_seconds, tell_slower
from hpcinfer.scaling.plan import Point, Recipe
from hpcinfer.scaling.running import cores_file
from hpcinfer.scaling.study import Run, Study, read_json

_LAST_LINES = 6  # of the log of a failed run
_LAUNCHER = re.compile(r"srun: |slurmstepd: |mpiexec |mpirun |prterun |-{20,}|\s*$")  # says that it ends the others


class Sample(NamedTuple):
    """What one run measured."""

    rate: float  # output tokens/s in the phase `run`, since all weights were there
    output_tokens: int
    tokens: int  # prompt and output
    run_s: float
    wall_s: float  # from the launcher's start to its end
    seconds: dict[str, float]  # rank-seconds by share
    hosts: int
    digest: str  # of the output; "" if the report has none


class Failure(NamedTuple):
    """Why a point has no result."""

    name: str
    reason: str
    last_lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """A point with what it came to."""

    point: Point
    samples: tuple[Sample, ...]
    num_runs: int  # that there should be
    cores: Cores | None
    failures: tuple[Failure, ...] = ()
    base: Result | None = None  # what efficiency is relative to
    shares: dict[str, float] | None = None

    @property
    def rate(self) -> float:
        """Median throughput."""
        return self.middle("rate")

    @property
    def used_cores(self) -> int:
        """Cores that compute: as many as there are threads, or fewer where these share cores."""
        threads = self.point.shape.ranks * (self.cores.threads if self.cores else 1)
        return min(threads, self.cores.num_cores) if self.cores else threads

    @property
    def is_crowded(self) -> bool:
        """Whether there are more threads than cores."""
        return self.cores is not None and self.point.shape.ranks * self.cores.threads > self.cores.num_cores

    @property
    def ideal(self) -> float | None:
        """Throughput if every core did what a core of the base point does."""
        return self.base.rate * self.used_cores / self.base.used_cores if self.base else None

    @property
    def efficiency(self) -> float | None:
        """Throughput over the ideal one."""
        return self.rate / self.ideal if self.ideal and self.samples else None

    def middle(self, name: str) -> float:
        """Median of a measured value."""
        return float(median(getattr(sample, name) for sample in self.samples))


class Series(NamedTuple):
    """One curve: a kind of scaling and a mesh."""

    scaling: str
    recipe: Recipe
    results: list[Result]  # by ranks, those with samples
    fits: list[Fit]
    fits_crowded: bool  # they are of ranks that share cores: a curve of this machine


def collect(study: Study) -> list[Result]:
    """Read the runs of all points; efficiency and losses are relative to the base point of each kind of scaling."""
    results = [_result(study, point) for point in study.points]
    bases = {scaling: _base(results, scaling) for scaling in {point.scaling for point in study.points}}
    return [_with_base(result, bases[result.point.scaling]) for result in results]


def series_of(results: Iterable[Result]) -> list[Series]:
    """Arrange results as curves, each with Amdahl's law and the USL where there are points enough."""
    groups: defaultdict[tuple[str, Recipe], list[Result]] = defaultdict(list)
    for result in results:
        if result.samples:
            groups[result.point.scaling, result.point.recipe].append(result)
    return [_series(*key, sorted(group, key=lambda each: each.point.shape.ranks)) for key, group in groups.items()]


def same_bytes(results: Iterable[Result]) -> dict[int, set[str]]:
    """Digests of all outputs, by number of rows."""
    found: defaultdict[int, set[str]] = defaultdict(set)
    for result in results:
        found[result.point.rows].update(sample.digest for sample in result.samples if sample.digest)
    return {rows: digests for rows, digests in sorted(found.items()) if digests}


def _series(scaling: str, recipe: Recipe, results: list[Result]) -> Series:
    roomy = [result for result in results if not result.is_crowded]
    is_enough = len({result.point.shape.ranks for result in roomy}) >= 3
    used = roomy if is_enough else results
    ranks, rates = [result.point.shape.ranks for result in used], [result.rate for result in used]
    fits = [found for law in ("Amdahl", "USL") if (found := fit(law, ranks, rates))]
    return Series(scaling, recipe, results, fits, any(result.is_crowded for result in used))


def _result(study: Study, point: Point) -> Result:
    values = read_json(cores_file(study, point.shape))
    cores = Cores(**values) if values else None
    if problem := point.problem():
        name = f"{point.shape}, {point.recipe}"
        return Result(point, (), study.repeats, cores, (Failure(name, problem),))
    runs = study.runs_of(point)
    failures = tuple(failure for run in runs if (failure := _failure(run)))
    samples = tuple(sample for run in runs if (sample := read_sample(run)))
    return Result(point, samples, study.repeats, cores, failures)


def read_sample(run: Run) -> Sample | None:
    """Read what a run measured; None if it is not done, or left no report."""
    path, ending = run.report, read_json(run.ending)
    report = read_json(path) if path and run.is_done else {}
    if not report:
        return None
    ranks, seconds = report["ranks"], ending["seconds"]
    output, prompt = (sum(rank["tokens"][kind] for rank in ranks) for kind in ("output", "prompt"))
    run_s = report["run"]["seconds"]["run"]
    digest = report.get("files", {}).get("output", {}).get("digest") or ""
    return Sample(
        rates_of(report["run"], ranks).output, output, output + prompt, run_s, seconds, rank_seconds(report, seconds),
        len({rank["host"] for rank in ranks}), digest,
    )  # fmt: skip


def _failure(run: Run) -> Failure | None:
    ending = read_json(run.ending)
    if not ending or (ending["exit_code"] == 0 and read_sample(run)):
        return None
    lines = run.log.read_text(errors="replace").splitlines() if run.log.exists() else []
    lines = [line for line in lines if not _LAUNCHER.match(line)] or lines
    code = ending["exit_code"]
    what = f"exit code {code}" if code else "exit code 0 but no report"
    reason = f"{what} after {ending['seconds']:.1f} s, {run.log}"
    return Failure(f"{run.point.run_name()}, run {run.repeat + 1}", reason, tuple(lines[-_LAST_LINES:]))


def _base(results: Sequence[Result], scaling: str) -> Result | None:
    """The point on the fewest cores, which ranks do not share if possible; of several the fastest."""
    measured = [result for result in results if result.point.scaling == scaling and result.samples]
    return min(measured, key=lambda result: (result.used_cores, result.is_crowded, -result.rate), default=None)


def _with_base(result: Result, base: Result | None) -> Result:
    if base is None or not result.samples:
        return result
    seconds, tokens = _together(result.samples)
    base_seconds, base_tokens = _together(base.samples)
    least_s = base_seconds[COMPUTING] / base_tokens if base_tokens else None
    return replace(result, base=base, shares=tell_slower(seconds, tokens, least_s))


def _together(samples: Sequence[Sample]) -> tuple[dict[str, float], int]:
    """Rank-seconds by share, and tokens, of all runs of a point."""
    seconds = {name: sum(sample.seconds[name] for sample in samples) for name in SHARES}
    return seconds, sum(sample.tokens for sample in samples)
