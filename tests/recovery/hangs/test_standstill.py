"""What threads are at: real threads in functions of modules with our names, and a clock that we move."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Queue
from typing import Any

import pytest

from hpcinfer.recovery.hangs.standstill import Kind, Threads, Usage, read_usage
from hpcinfer.report.metrics import IDLE, SPARE, Metrics

LIMIT_S = 100.0

OUTER = "def work(inner, *arguments):\n    inner(*arguments)"
READ = "import os\ndef read(pipe):\n    os.read(pipe, 1)"
READ_MUCH = "import os\ndef read_much(stop):\n    file = os.open('/dev/zero', 0)\n    while not stop: os.read(file, 1)"
COMPUTE = "def compute(stop):\n    while not stop: sum(range(1000))"
POLL = "import time\ndef nap():\n    time.sleep(0.0005)\ndef poll(stop):\n    while not stop: nap()"


def function(module: str, code: str) -> Callable[..., None]:
    """The last function of the code, as one of a module of ours."""
    namespace: dict[str, Any] = {"__name__": f"hpcinfer.{module}"}
    exec(code, namespace)
    return list(namespace.values())[-1]


@contextmanager
def running(target: Callable[..., None], *arguments: Any) -> Iterator[threading.Thread]:
    """A thread, once it has had time to get where it waits."""
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    time.sleep(0.1)
    yield thread


@pytest.fixture
def pipe() -> Iterator[int]:
    """The end of a pipe that gives nothing."""
    reader, writer = os.pipe()
    yield reader
    os.write(writer, b"xxxx")
    os.close(writer)


@pytest.fixture
def stop() -> Iterator[list[bool]]:
    """What makes threads end."""
    wanted: list[bool] = []
    yield wanted
    wanted.append(True)


def kind_after(threads: Threads, *elapsed_s: float, pause_s: float = 0.0) -> Kind:
    """What this rank is at after some looks."""
    for each in elapsed_s:
        time.sleep(pause_s)
        threads.look(each)
    return threads.stands(LIMIT_S)[0]


def test_main_thread_waits_for_others_once_it_has_done_so_long_enough(stop: list[bool]) -> None:
    with running(function("engine", OUTER), function("comm.mpi", POLL), stop) as thread:
        threads = Threads(thread)
        assert kind_after(threads, 0, 60) is Kind.MOVING
        assert kind_after(threads, *[2.0] * 25, pause_s=0.001) is Kind.WAITING, "looking for messages is no progress"
        assert threads.main.still_s == 110.0


def test_phases_that_begin_are_progress(stop: list[bool]) -> None:
    with running(function("comm.mpi", POLL), stop) as thread:
        threads, metrics = Threads(thread), Metrics()
        threads.follow(metrics)
        with metrics.phase("waiting for results"):
            assert kind_after(threads, 0, 90) is Kind.MOVING
            assert threads.place == "waiting for results"
        with metrics.phase("forward"):
            assert kind_after(threads, 90) is Kind.MOVING
            assert kind_after(threads, 110) is Kind.WAITING
            assert threads.place == "forward"


@pytest.mark.parametrize(("place", "kind"), [(IDLE, Kind.IDLE), (SPARE, Kind.SPARE)])
def test_phase_says_that_there_is_nothing_to_do(stop: list[bool], place: str, kind: Kind) -> None:
    with running(function("recovery.rows", POLL), stop) as thread:
        threads, metrics = Threads(thread), Metrics()
        threads.follow(metrics)
        with metrics.phase(place):
            assert kind_after(threads, 0, *[30.0] * 5, pause_s=0.001) is kind


def test_call_that_does_not_come_back_is_stuck(pipe: int) -> None:
    with running(function("engine", OUTER), function("weights", READ), pipe) as thread:
        threads = Threads(thread)
        assert kind_after(threads, 0, 90) is Kind.MOVING
        assert kind_after(threads, 20) is Kind.STUCK
        assert "read" in threads.stands(LIMIT_S)[1].stack[0]


@pytest.mark.parametrize("code", [COMPUTE, READ_MUCH])
def test_long_work_is_not_stuck(stop: list[bool], code: str) -> None:
    with running(function("engine", OUTER), function("kernels", code), stop) as thread:
        assert kind_after(Threads(thread), 0, 150, 150, pause_s=0.5) is Kind.MOVING


def test_sums_of_the_tree_are_no_waiting(pipe: int) -> None:
    with running(function("engine", OUTER), function("comm.tree", READ), pipe) as thread:
        assert kind_after(Threads(thread), 0, 150) is Kind.STUCK


def test_thread_of_ours_that_hangs_in_a_file_system_counts(stop: list[bool], pipe: int) -> None:
    writer = running(function("recovery.writer_thread", OUTER), function("recovery.journal", READ), pipe)
    with running(function("engine", OUTER), function("kernels", COMPUTE), stop) as thread, writer as stuck:
        threads = Threads(thread)
        assert kind_after(threads, 0, 150, pause_s=0.5) is Kind.STUCK
        assert threads.stands(LIMIT_S)[1].name == stuck.name


def test_threads_that_wait_to_be_given_something_are_not_stuck(stop: list[bool], pipe: int) -> None:
    loops = [running(function("recovery.rows", READ), pipe), running(Queue[int]().get),
             running(function("recovery.writer_thread", OUTER), Queue[int]().get)]  # fmt: skip
    with running(function("engine", OUTER), function("kernels", COMPUTE), stop) as thread:
        for loop in loops:
            loop.__enter__()
        assert kind_after(Threads(thread), 0, 150, pause_s=0.5) is Kind.MOVING


def test_usage_counts_calls_and_core_time() -> None:
    thread = threading.get_native_id()
    before = read_usage(thread)
    assert not before.has_worked_since(before)
    sum(range(20_000_000))
    after = read_usage(thread)
    assert after.core_s - before.core_s >= 0.05 and after.has_worked_since(before)
    assert Usage(1.0, 5, 0).has_worked_since(Usage(1.0, 4, 0)) and Usage(1.0, 4, 1).has_worked_since(Usage(1.0, 4, 0))
    assert not Usage(1.04, 4, 0).has_worked_since(Usage(1.0, 4, 0))
