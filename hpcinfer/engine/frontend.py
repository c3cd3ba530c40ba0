"""What the leader's engine asks of the world outside: more requests, and a place for finished rows."""

from collections import deque
from typing import Protocol

from hpcinfer.data.completion import Choice
from hpcinfer.engine.request import Request


class Frontend(Protocol):
    """Feeds one replica. Only its leader has one."""

    def take(self, wanted: int) -> list[Request]:
        """New requests until they have `wanted` choices together, without waiting; fewer or none if there are none."""

    def finish(self, row: int, choices: tuple[Choice, ...]) -> None:
        """Take over a finished row."""

    def is_exhausted(self) -> bool:
        """Whether `take` will never give anything again."""

    def is_stopping(self) -> bool:
        """Whether to end soon, with sequences unfinished; once true it stays so."""

    def wait(self) -> None:
        """Pass a moment: nothing can be computed now."""


class ListFrontend:
    """Requests from a list, finished rows into a dict: for tests and small programs."""

    def __init__(self, requests: list[Request]) -> None:
        self._requests = deque(requests)
        self.finished: dict[int, tuple[Choice, ...]] = {}

    def take(self, wanted: int) -> list[Request]:
        """Give the next ones of the list."""
        taken: list[Request] = []
        while wanted > 0 and self._requests:
            taken.append(self._requests.popleft())
            wanted -= taken[-1].sampling.n
        return taken

    def finish(self, row: int, choices: tuple[Choice, ...]) -> None:
        """Keep the choices."""
        assert row not in self.finished, f"{row = } finished twice"
        self.finished[row] = choices

    def is_exhausted(self) -> bool:
        """Whether the list is empty."""
        return not self._requests

    def is_stopping(self) -> bool:
        """Never: a list is worked through."""
        return False

    def wait(self) -> None:
        """Never needed: a list is there or empty."""
