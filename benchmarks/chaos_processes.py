"""Jobs that will be hurt: started with a mark in their environment, found again by it, ended at last."""

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

MARK = "HPCINFER_CHAOS"
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")


class Process(NamedTuple):
    """A living process of a job."""

    pid: int
    rank: int | None  # in its MPI job; None for launchers, daemons and supervisors
    command: str

    def send(self, number: int) -> bool:
        """Send a signal; whether the process was still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
            return True
        return False


class RunningJob:
    """A command and everything that it starts, on this machine or on its virtual hosts."""

    def __init__(self, argv: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.mark, self.log = f"{MARK}={uuid.uuid4().hex}", log
        name, _, value = self.mark.partition("=")
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent,
                env={**os.environ, **environment, name: value}, start_new_session=True,
            )  # fmt: skip
        self.start = time.monotonic()

    @property
    def is_running(self) -> bool:
        """Whether the command itself still runs."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the command itself."""
        return self._process.pid

    def processes(self) -> list[Process]:
        """All living processes of the job, by process id."""
        return sorted(_marked(self.mark.encode()))

    def ranks(self) -> list[Process]:
        """Its ranks, by rank."""
        found = [process for process in self.processes() if process.rank is not None]
        return sorted(found, key=lambda process: (process.rank, process.pid))

    def wait(self, limit_s: float) -> int | None:
        """Wait for the end of the command; None if it takes longer."""
        try:
            return self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> int:
        """Kill whatever is left of the job, until nothing is; returns how many ranks there were."""
        num_ranks = len(self.ranks())
        while left := self.processes():
            for process in left:
                process.send(signal.SIGKILL)
            time.sleep(0.01)
        self._process.wait()
        return num_ranks


def _marked(mark: bytes) -> Iterator[Process]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # ended meanwhile, or somebody else's
                variables = (folder / "environ").read_bytes().split(b"\0")
                if mark in variables and not _is_zombie(folder):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    yield Process(int(folder.name), _rank(variables), command)


def _is_zombie(folder: Path) -> bool:
    return (folder / "stat").read_bytes().rpartition(b")")[2].split()[0] in (b"Z", b"X")


def _rank(variables: list[bytes]) -> int | None:
    values = dict(variable.decode(errors="replace").partition("=")[::2] for variable in variables)
    return next((int(values[name]) for name in _RANK_VARIABLES if name in values), None)
