"""What every test run has: the installed hpcinfer, time limits, ranks under mpiexec, nothing left behind."""

import contextlib
import importlib
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, ModuleType

import hypothesis
import mpi_harness
import pytest
from jobs import SESSION_VARIABLE, JobTimeoutError, kill_processes, left_behind, mpi_environment, wait_until

TIME_LIMIT_S = 120.0  # of a test without a `time_limit` mark
CHECKOUT = Path(__file__).parents[1]

# `python -m pytest` puts the working directory first; what is tested is what installs.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != CHECKOUT]

for _name, _value in mpi_environment().items():
    os.environ.setdefault(_name, _value)  # also for tests that start MPI in this process
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # more threads than cores, in tests of any number of threads

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: kernels of GPUs run on CPUs

hypothesis.settings.register_profile("hpcinfer", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("hpcinfer")

_empty_files: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """Load the MPI harness, unless this is one of its ranks; end tidily when we are told to."""
    if not config.pluginmanager.is_registered(mpi_harness):
        config.pluginmanager.register(mpi_harness)
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """End a test, its fixtures included, that takes too long."""
    mark = item.get_closest_marker("time_limit")
    limit = float(mark.args[0]) if mark else getattr(item, "time_limit_s", TIME_LIMIT_S)

    def stop(signal_number: int, frame: FrameType | None) -> None:
        pytest.fail(f"still running after {limit:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Notice test files without tests."""
    if report.nodeid.endswith(".py") and report.passed and not report.result:
        _empty_files.append(report.nodeid)


def pytest_collection_finish() -> None:
    """Refuse test files without tests: they look like tests and never run."""
    if _empty_files:
        raise pytest.UsageError(f"no tests in {', '.join(_empty_files)}")


@pytest.fixture(scope="module")
def benchmark_module() -> Iterator[Callable[[str], ModuleType]]:
    """Imports modules of the benchmarks, which are programs and not a package."""
    folder, before = CHECKOUT / "benchmarks", set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module
        for name in set(sys.modules) - before:
            if folder in Path(getattr(sys.modules[name], "__file__", None) or "/").parents:
                del sys.modules[name]


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail when a process that the tests started outlives them."""
    if SESSION_VARIABLE in os.environ:  # a rank: the session that started it looks
        yield
        return
    session = os.environ[SESSION_VARIABLE] = uuid.uuid4().hex
    yield
    with contextlib.suppress(JobTimeoutError):
        wait_until(lambda: not left_behind(session), timeout=5)
    found = left_behind(session)
    names = [str(process) for process in found]
    kill_processes(found)
    assert not names, "processes outlived the tests"
