"""A step: one replica's MPI job as a child of the supervisor, which dies with it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator
from typing import IO, Protocol

import psutil

from hpcinfer.recovery.inflight import STEP_VARIABLE
from hpcinfer.supervision.launchers import Command

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class Step(Protocol):
    """What the supervisor does with a step."""

    def poll(self) -> int | None:
        """Exit code once the launcher has returned; as of a shell, 128 and its number for a signal."""

    def stop(self) -> None:
        """Ask all ranks to put their work away and to end."""

    def end(self) -> None:
        """End the step; the second call cannot be refused."""

    def bury(self) -> None:
        """See to it that nothing of an ended step is left on this host."""


class LaunchedStep:
    """A step under a launcher, in a session of its own: Ctrl-C reaches the supervisor alone.

    When the supervisor dies, the kernel ends the launcher, and the launcher ends the ranks.
    """

    def __init__(self, name: str, command: Command, log: IO[bytes] | None = None) -> None:
        """Start it. What the ranks print goes to the log, or to standard error: standard output is the supervisor's."""
        self._name = name
        parent = os.getpid()
        self._process = subprocess.Popen(
            command.argv, env=command.environment, stdin=subprocess.DEVNULL, stdout=log or 2, stderr=log,
            start_new_session=True, preexec_fn=lambda: _die_with(parent),
        )  # fmt: skip
        self._was_ended = False

    def poll(self) -> int | None:
        """Exit code once the launcher has returned."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def stop(self) -> None:
        """Send SIGUSR1, which srun and mpiexec pass on; SIGTERM would end mpiexec and its ranks at once."""
        self._process.send_signal(signal.SIGUSR1)

    def end(self) -> None:
        """Send SIGTERM to the launcher, or SIGKILL if that was done."""
        self._process.send_signal(signal.SIGKILL if self._was_ended else signal.SIGTERM)
        self._was_ended = True

    def bury(self) -> None:
        """Kill ranks on this host that the launcher has left."""
        left = list(_processes_of(self._name))
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=5)


def _processes_of(step: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.environ().get(STEP_VARIABLE) == step:
                yield process
        except (psutil.Error, OSError):
            continue  # gone, or not ours


def _die_with(parent: int) -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has died before the kernel was told
        os.kill(os.getpid(), signal.SIGTERM)
