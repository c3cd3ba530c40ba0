"""A time limit that also holds while MPI starts or waits, when Python itself cannot run; and last words for a process
that MPI ends."""

import contextlib
import faulthandler
import os
import select
import time
from collections.abc import Callable
from types import TracebackType

_LAST_WORDS_S = 0.5  # between what is said and the end of the process


class Guard:
    """Ends this process with code 1 after a time, and says in which step it was: a child process speaks for it.

    Args:
        limit_s: time until then.
        lag_s: further time, in which others may speak first.
        speak: what to write, of the step and whether this process has ended in it by itself; called in the child.
    """

    def __init__(self, limit_s: float, lag_s: float, speak: Callable[[str, bool], bytes]) -> None:
        self._limit_s, self._lag_s, self._speak = limit_s + lag_s, lag_s, speak
        self._pipe = self._child = -1
        self.current = ""  # step

    def __enter__(self) -> "Guard":
        end = time.monotonic() + self._limit_s
        reader, self._pipe = os.pipe()
        self._child = os.fork()  # no thread runs yet, and MPI has not started
        if self._child == 0:
            with contextlib.suppress(BaseException):
                os.close(self._pipe)
                self._watch(reader, end)
            os._exit(0)
        os.close(reader)
        self._devnull = open(os.devnull, "w")  # noqa: SIM115  # as long as the timer
        faulthandler.dump_traceback_later(self._limit_s + _LAST_WORDS_S, exit=True, file=self._devnull)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._devnull.close()
        self.step("")
        os.close(self._pipe)
        os.waitpid(self._child, 0)

    def step(self, what: str) -> None:
        """Say what comes next."""
        self.current = what
        with contextlib.suppress(BrokenPipeError):
            os.write(self._pipe, f"{what}\n".encode())

    def _watch(self, reader: int, end: float) -> None:
        step = ""
        while (left := end - time.monotonic()) > 0:
            if select.select([reader], [], [], left)[0]:
                data = os.read(reader, 4096)
                if not data:
                    if step:
                        time.sleep(self._lag_s)
                        os.write(1, self._speak(step, True))
                    return
                step = data.decode().split("\n")[-2]
        os.write(1, self._speak(step, False))
