"""A pytest plugin: tests marked `mpi` run under mpiexec by themselves, on each number of ranks in `RANKS`.

Plain pytest replaces a marked test by one item for each number of ranks. The first item of a file that runs starts
the file's marked tests under mpiexec; there each rank appends its results to a file of its own, from which the items
take theirs. A test passes when it passes on all ranks. After each test the ranks meet; when one has failed and
the others do not come (they wait in a collective), the job ends, and so it does when a test hangs.
"""

import dataclasses
import faulthandler
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from jobs import JobTimeoutError, find_mpiexec, start_mpi

RANKS = (2, 4)
TEST_LIMIT_S = 60.0  # a test that takes longer on a rank ends the job
JOB_LIMIT_S = 120.0  # start-up and all tests of a file
MEETING_LIMIT_S = 5.0  # how long a rank waits for the others after a failure
RESULTS = "HPCINFER_TEST_RESULTS"  # folder for the ranks' results; set when we started the ranks


class Result(NamedTuple):
    """One phase of one test on one rank."""

    rank: int
    test: str  # node id without the file
    outcome: str  # passed, failed or skipped
    text: str  # traceback, or reason of the skip


class RankFailureError(Exception):
    """A test failed on at least one rank."""


@dataclasses.dataclass
class RankedRun:
    """The marked tests of one file on N ranks, run once."""

    path: Path
    ranks: int
    folder: Path  # where the ranks write
    tests: list[str] = dataclasses.field(default_factory=list)  # node ids without the file
    results: list[Result] | None = None
    ending: str = ""  # how mpiexec ended and what it printed, unless all went well

    def check(self, test: str) -> None:
        """Pass, skip or fail as the ranks did with this test."""
        if self.results is None:
            self.results = self._run()
        results = [result for result in self.results if result.test == test]
        failures = [f"--- rank {r.rank} of {self.ranks} ---\n{r.text}" for r in results if r.outcome == "failed"]
        silent = sorted(set(range(self.ranks)) - {result.rank for result in results})
        if silent:
            failures.append(f"--- no result from rank {', '.join(map(str, silent))} of {self.ranks} ---\n{self.ending}")
        if failures or (self.ending and all(result.outcome != "failed" for result in self.results)):
            raise RankFailureError("\n".join(failures) or self.ending)
        reasons = sorted({result.text for result in results if result.outcome == "skipped"})
        if reasons:
            pytest.skip("; ".join(reasons))

    def _run(self) -> list[Result]:
        self.folder.mkdir(parents=True)
        tests = [f"{self.path}::{test}" for test in self.tests]
        argv = [sys.executable, "-m", "pytest", "--with-mpi", "-q", "--no-header", "--import-mode=importlib",
                "-p", "no:cacheprovider", "-p", "mpi_harness", "-o", "faulthandler_timeout=0", *tests]
        job = start_mpi(self.ranks, argv, {RESULTS: str(self.folder)}, cwd=Path(__file__).parent)
        try:
            run = job.wait(JOB_LIMIT_S)
            ending = f"mpiexec ended with {run.rc}\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}" if run.rc else ""
        except JobTimeoutError as error:
            ending = str(error)[:8000]
        stacks = (f"\nrank {path.stem} hung:\n{path.read_text()}" for path in sorted(self.folder.glob("*.stacks")))
        self.ending = ending + "".join(stacks) if ending else ""
        lines = (line for path in sorted(self.folder.glob("*.jsonl")) for line in path.read_text().splitlines())
        return [Result(**json.loads(line)) for line in lines]


class RankedItem(pytest.Item):
    """One marked test on one number of ranks."""

    time_limit_s = JOB_LIMIT_S + 30  # the first item of a file waits for all of them

    def __init__(self, *, run: RankedRun, item: pytest.Item, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._run, self._test, self._location = run, _test_name(item.nodeid), item.reportinfo()
        run.tests.append(self._test)

    def runtest(self) -> None:
        """Take the results of all ranks."""
        self._run.check(self._test)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Show the ranks' tracebacks, not ours."""
        return str(excinfo.value) if excinfo.errisinstance(RankFailureError) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[os.PathLike[str] | str, int | None, str]:
        """Where the test stands."""
        return self._location


class Rank:
    """Inside mpiexec: writes this rank's results, and meets the other ranks after each test."""

    def __init__(self, folder: Path) -> None:
        from mpi4py import MPI

        self._world = MPI.COMM_WORLD.Dup()
        self.folder = folder / str(self._world.rank)  # for temporary files of the tests
        self._results = self.folder.with_suffix(".jsonl").open("a", buffering=1)
        self._stacks = self.folder.with_suffix(".stacks").open("w")
        self._has_failed = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        """End the job when this test hangs here, or has failed here while other ranks wait for it."""
        self._has_failed = False
        faulthandler.dump_traceback_later(TEST_LIMIT_S, exit=True, file=self._stacks)
        result = yield
        self._meet()
        faulthandler.cancel_dump_traceback_later()
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write what says something: the call, and a set-up or tear-down that did not pass."""
        if report.when != "call" and report.passed:
            return
        self._has_failed |= report.failed
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        result = Result(self._world.rank, _test_name(report.nodeid), report.outcome, text)
        self._results.write(json.dumps(result._asdict()) + "\n")

    def _meet(self) -> None:
        request, end = self._world.Ibarrier(), time.monotonic() + MEETING_LIMIT_S
        while not request.Test():
            if self._has_failed and time.monotonic() > end:
                self._world.Abort(1)
            time.sleep(0.001)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Become a rank when we are one."""
    if config.getoption("--with-mpi") and RESULTS in os.environ:
        rank = Rank(Path(os.environ[RESULTS]))
        config.option.basetemp = rank.folder
        config.pluginmanager.register(rank)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Replace each marked test by one item for each number of ranks; leave it (skipped) when there is no mpiexec."""
    if not config.getoption("--with-mpi") and find_mpiexec():
        runs: dict[tuple[Path, int], RankedRun] = {}
        folder = Path(config.stash.setdefault(_FOLDER, tempfile.mkdtemp(prefix="hpcinfer-ranks-")))
        items[:] = [new for item in items for new in _ranked(item, runs, folder)]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what the ranks wrote."""
    if _FOLDER in config.stash:
        shutil.rmtree(config.stash[_FOLDER], ignore_errors=True)


_FOLDER = pytest.StashKey[str]()


def _ranked(item: pytest.Item, runs: dict[tuple[Path, int], RankedRun], folder: Path) -> Iterator[pytest.Item]:
    marks = list(item.iter_markers("mpi"))
    least = max((mark.kwargs.get("min_size") or 1 for mark in marks), default=0)
    if not marks:
        yield item
    elif least > max(RANKS):
        raise pytest.UsageError(f"{item.nodeid}: min_size={least}, but tests run on at most {max(RANKS)} ranks")
    for ranks in RANKS if marks else ():
        if ranks >= least:
            run = runs.setdefault((item.path, ranks), RankedRun(item.path, ranks, folder / f"{len(runs)}"))
            yield RankedItem.from_parent(item.parent, name=f"{item.name} on {ranks} ranks", run=run, item=item)


def _test_name(node_id: str) -> str:
    return node_id.partition("::")[2]
