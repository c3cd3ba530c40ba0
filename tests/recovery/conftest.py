"""Small jobs, and child processes that can be killed."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from thread_group import run_ranks

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.recovery.index import Index, build_index
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.manifest import open_manifest


class Children:
    """Forked processes."""

    def __init__(self) -> None:
        self._pids: list[int] = []

    def start(self, function: Callable[[], None]) -> int:
        """Run the function in a child; returns its pid."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                function()
                code = 0
            finally:
                os._exit(code)
        self._pids.append(pid)
        return pid

    def kill(self, pid: int) -> None:
        """End a child without warning, and bury it."""
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self._pids.remove(pid)

    def wait(self) -> None:
        """All children must end well."""
        while self._pids:
            assert os.waitpid(self._pids.pop(), 0)[1] == 0

    def end(self) -> None:
        """Leave nothing behind."""
        while self._pids:
            self.kill(self._pids[-1])


@pytest.fixture
def children() -> Iterator[Children]:
    found = Children()
    yield found
    found.end()


@pytest.fixture
def ranks() -> Callable[[int, Callable[[Any], Any]], list[Any]]:
    return run_ranks


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., tuple[JobPaths, Index]]:
    """Make the directory and the index of a job over lines of text."""

    def make(num_rows: int = 100, line: Callable[[int], str] = "prompt {}".format) -> tuple[JobPaths, Index]:
        source = tmp_path / "prompts.txt"
        source.write_text("".join(line(row) + "\n" for row in range(num_rows)))
        paths = JobPaths(tmp_path / "completions.jsonl")
        open_manifest(paths, {"seed": 1}, SerialGroup())
        return paths, build_index(paths, source, "text", SerialGroup())

    return make
