"""Messages of the MPI: those on their way, and those that are sent and received again and again.

What is given up may still be written to by the MPI: its buffer is kept until the MPI says that it is done.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec, TypeVar

from mpi4py import MPI

from hpcinfer.comm.waiting import Pause
from hpcinfer.errors import RankFailedError, RevokedError

P = ParamSpec("P")
T = TypeVar("T")


def rank_failure(error: MPI.Exception) -> RankFailedError | None:
    """Turn the MPI's word for a dead rank into ours; None for all other errors."""
    kind = error.Get_error_class()
    if kind == MPI.ERR_REVOKED:
        return RevokedError("the group has been revoked")
    return RankFailedError("a rank has died") if kind in (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING) else None


def translated(method: Callable[P, T]) -> Callable[P, T]:
    """Raise our errors where a rank has died."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except MPI.Exception as error:
            raise rank_failure(error) or error from None

    return call


UNFINISHED: deque[tuple[MPI.Request, object]] = deque()  # given up, or of dead groups: MPI may touch their buffers


def prune() -> None:
    """Let go of the buffers that MPI is done with. What is looked at is nobody else's meanwhile."""
    for _ in range(len(UNFINISHED)):
        with suppress(IndexError):  # another thread has taken it
            request, buffer = UNFINISHED.popleft()
            if not _is_over(request):
                UNFINISHED.append((request, buffer))


def _is_over(request: MPI.Request) -> bool:
    try:
        if not request.Test():
            return False
    except MPI.Exception as error:
        return rank_failure(error) is not None
    if request:  # a persistent one outlives its message
        request.Free()
    return True


class _Pending:
    """A non-blocking message; its buffer lives until MPI is done with it."""

    def __init__(self, request: MPI.Request, buffer: object) -> None:
        self._request, self._buffer = request, buffer

    def __del__(self) -> None:
        if self._request:
            UNFINISHED.append((self._request, self._buffer))


class MpiReceive(_Pending):
    """A message that is to come."""

    @translated
    def test(self) -> bool:
        """Whether it is there."""
        return bool(self._request.Test())

    def cancel(self) -> None:
        """Let it come no more."""
        if self._request:
            self._request.Cancel()

    def wait(self) -> None:
        """Return when it is there."""
        pause = Pause()
        while not self.test():
            pause()


class MpiPending(_Pending):
    """A non-blocking send. To a dead rank it has left."""

    def cancel(self) -> None:
        """Let it leave: nobody writes to its buffer."""

    def wait(self) -> None:
        """Return when the buffer may be used again."""
        pause = Pause()
        while not self.test():
            pause()

    def test(self) -> bool:
        """Whether the message has left."""
        try:
            return bool(self._request.Test())
        except MPI.Exception as error:
            if rank_failure(error) is None:
                raise
            return True


class PersistentMessages:
    """Messages that are sent and received again and again; the MPI has been told once what they are."""

    def __init__(self, requests: list[MPI.Prequest], buffers: object) -> None:
        self._requests, self._buffers = requests, buffers

    @translated
    def start(self) -> None:
        """Let all of them leave and come once more."""
        MPI.Prequest.Startall(self._requests)

    @translated
    def finish(self) -> None:
        """Wait until all of them have left and come."""
        pause = Pause()
        while not MPI.Request.Testall(self._requests):
            pause()

    def cancel(self) -> None:
        """Nothing: where a rank may die, messages are made anew each time."""

    def __del__(self) -> None:
        UNFINISHED.extend((request, self._buffers) for request in self._requests)
