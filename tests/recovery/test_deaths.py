"""Deaths of replicas: what their files say, who records them, and which rows become errors."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.errors import PeerError, StorageError
from hpcinfer.recovery import inflight
from hpcinfer.recovery.deaths import (
    ALONE_AFTER,
    CRASH,
    HUNG,
    KILLED,
    NODE_LOST,
    POISON_AFTER,
    Deaths,
    cause_of,
    find_dead,
    poison_error,
    record_death,
)
from hpcinfer.recovery.inflight import (
    STEP_VARIABLE,
    CrashFile,
    InFlight,
    Left,
    is_own_fault,
    list_left,
    read_left,
    replica_name,
    start_name,
)
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.leases import Holder


@pytest.fixture
def paths(tmp_path):
    return empty_job(tmp_path)


def empty_job(folder):
    paths = JobPaths(folder / "out.jsonl")
    paths.create()
    return paths


def left_by(name, rows, crash="", attempt=0):
    return Left(name, Holder("elsewhere", 1, 1, "another boot", 1), "part", attempt, tuple(rows), crash)


def record(paths, *deaths, attempt=0):
    """Record deaths, each (rows, cause)."""
    for number, (rows, cause) in enumerate(deaths):
        assert record_death(paths, left_by(f"r{attempt}-{number}", rows, attempt=attempt), cause)


def die_in_child(paths, name, code, *rows):
    """A leader with rows in flight that runs `code` in its own process; returns how it ended."""
    program = f"""
import ctypes, os, signal
from pathlib import Path
from hpcinfer.recovery.inflight import CrashFile, InFlight
from hpcinfer.recovery.layout import JobPaths
paths = JobPaths(Path({str(paths.output)!r}))
with CrashFile(paths, {name!r}) as crash, InFlight(paths, {name!r}) as flight:
    for row in {list(rows)!r}:
        flight.opened(row)
    {code}
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


def age(path: Path, seconds: float) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_rows_in_flight_are_those_opened_and_not_closed(paths):
    flight = InFlight(paths, "a.0", part="p", attempt=3)
    for row in (7, 0, 12):
        flight.opened(row)
    flight.closed(7)
    flight.opened(1 << 40)
    left = read_left(paths, "a.0")
    assert left.rows == (0, 12, 1 << 40)
    assert (left.part, left.attempt, left.crash) == ("p", 3, "")
    assert left.holder == Holder.this_process()
    flight.close()
    assert read_left(paths, "a.0") is None and list_left(paths) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 11), max_size=60))
def test_file_follows_any_order_of_events(toggles):
    with tempfile.TemporaryDirectory() as folder:
        paths, open_rows = empty_job(Path(folder)), set()
        flight = InFlight(paths, "a.0")
        for row in toggles:
            flight.closed(row) if row in open_rows else flight.opened(row)
            open_rows ^= {row}
            assert read_left(paths, "a.0").rows == tuple(sorted(open_rows))
        size = paths.inflight_rows("a.0").stat().st_size
        assert size <= 1024 + 12 * 8  # slots are used again
        flight.close()


def test_damaged_file_counts_for_nothing(paths):
    InFlight(paths, "a.0").opened(1)
    data = paths.inflight_rows("a.0").read_bytes()
    for size in range(0, len(data), 41):
        paths.inflight_rows("a.0").write_bytes(data[:size])
        left = read_left(paths, "a.0")
        assert left is None or left.rows == ()


def test_file_catches_up_after_an_outage(paths, monkeypatch):
    flight = InFlight(paths, "a.0")
    flight.opened(5)
    with monkeypatch.context() as patch:
        patch.setattr(inflight, "write_all", lambda *_: (_ for _ in ()).throw(OSError(5, "gone")))
        flight.closed(5)
        flight.opened(6)
        flight.opened(7)
    assert read_left(paths, "a.0").rows == (5,)
    flight.opened(8)
    assert read_left(paths, "a.0").rows == (6, 7, 8)
    flight.close()


def test_name_comes_from_the_supervisor_or_is_new(monkeypatch):
    monkeypatch.delenv(STEP_VARIABLE, raising=False)
    assert start_name(SerialGroup()) != start_name(SerialGroup())
    monkeypatch.setenv(STEP_VARIABLE, "step-7")
    assert replica_name(start_name(SerialGroup()), "2") == "step-7.2"


def test_list_can_be_of_one_start(paths):
    for name in ("a.0", "a.10", "b.0", "ab.0"):
        InFlight(paths, name)
    assert list_left(paths, "a") == ["a.0", "a.10"]
    assert list_left(paths) == ["a.0", "a.10", "ab.0", "b.0"]


@pytest.mark.parametrize(("code", "cause"), [
    ("os.kill(os.getpid(), signal.SIGSEGV)", CRASH),
    ("ctypes.string_at(0)", CRASH),
    ("os.abort()", CRASH),
    ("raise RuntimeError('broken')", CRASH),
    ("crash.note('hang: rank 3'); os._exit(1)", HUNG),
    ("os.kill(os.getpid(), signal.SIGKILL)", KILLED),
    ("os.kill(os.getpid(), signal.SIGTERM)", KILLED),
    ("raise OSError(28, 'full')", KILLED),
])
def test_cause_is_told_from_what_a_dead_rank_has_left(code, cause, paths):
    assert die_in_child(paths, "a.0", code, 4, 5).returncode != 0
    (left,) = find_dead(paths)
    assert (left.rows, cause_of(left)) == ((4, 5), cause)
    assert ("line" in left.crash or "broken" in left.crash or "hang" in left.crash) == (cause != KILLED)


def test_good_end_leaves_nothing(paths):
    run = die_in_child(paths, "a.0", "flight.closed(4)", 4)
    assert run.returncode == 0, run.stderr
    assert list(paths.inflight.iterdir()) == []


def test_dead_replica_is_recorded_once(paths):
    die_in_child(paths, "a.0", "os.kill(os.getpid(), signal.SIGSEGV)", 4)
    (left,) = find_dead(paths)
    assert record_death(paths, left, CRASH)
    assert not record_death(paths, left, KILLED)
    assert find_dead(paths) == [] and list(paths.inflight.iterdir()) == []
    (file,) = paths.deaths.iterdir()
    assert json.loads(file.read_bytes())["cause"] == CRASH


def test_death_without_rows_is_no_record(paths):
    die_in_child(paths, "a.0", "os.kill(os.getpid(), signal.SIGKILL)")
    Deaths.read(paths)
    assert not paths.deaths.exists() and list(paths.inflight.iterdir()) == []


def test_living_replica_is_left_alone(paths):
    with InFlight(paths, "a.0") as flight:
        flight.opened(1)
        assert find_dead(paths) == []
        Deaths.read(paths)
        assert read_left(paths, "a.0").rows == (1,)
        flight.closed(1)


def test_replica_of_another_node_is_dead_when_its_crash_is_old(paths):
    flight = InFlight(paths, "a.0")
    flight.opened(1)
    header = json.loads(paths.inflight_rows("a.0").read_bytes()[:1024])
    header["holder"]["boot_id"] = "of another node"
    with paths.inflight_rows("a.0").open("r+b") as file:
        file.write(json.dumps(header).encode().ljust(1024))
    assert find_dead(paths) == []  # nothing tells
    with CrashFile(paths, "a.0") as crash:
        crash.note("Fatal Python error: Segmentation fault")
    assert find_dead(paths) == []  # its survivors may be at it
    age(paths.inflight_crash("a.0"), 3600)
    assert [left.name for left in find_dead(paths)] == ["a.0"]


def test_crash_file_can_move(paths):
    with CrashFile(paths, "a.0") as crash:
        crash.move("a.1")
        crash.note("words")
    assert paths.inflight_crash("a.0").read_bytes() == b""
    assert paths.inflight_crash("a.1").read_bytes() == b"words"


@pytest.mark.parametrize(("error", "is_own"), [
    (RuntimeError(), True), (AssertionError(), True), (MemoryError(), True), (IndexError(), True),
    (PeerError("x"), False), (StorageError("x"), False), (OSError(), False), (KeyboardInterrupt(), False),
    (type("Exception", (Exception,), {"__module__": "mpi4py.MPI"})(), False),
])
def test_errors_that_rows_may_cause(error, is_own):
    assert is_own_fault(error) == is_own


@pytest.mark.parametrize(("first", "second"), [(CRASH, HUNG), (KILLED, CRASH), (NODE_LOST, KILLED)])
def test_two_deaths_of_any_kind_make_a_row_wait_until_it_is_alone(paths, first, second):
    record(paths, ((1, 2), first))
    assert not Deaths.read(paths).must_be_alone(1)
    deaths = Deaths.read(paths)
    record_death(paths, left_by("later", (2, 3)), second)
    assert not deaths.must_be_alone(2)
    deaths.refresh()
    assert [deaths.must_be_alone(row) for row in (1, 2, 3)] == [False, True, False]
    assert not deaths.is_poison(2)


def test_three_deaths_alone_make_an_error(paths):
    record(paths, *[((9,), CRASH)] * (POISON_AFTER - 1), ((9, 8), CRASH))
    assert not Deaths.read(paths).is_poison(9)
    record_death(paths, left_by("last", (9,)), CRASH)
    assert Deaths.read(paths).is_poison(9)
    assert str(POISON_AFTER) in poison_error().found


def test_retry_of_errors_begins_to_count_anew(paths):
    record(paths, *[((9,), CRASH)] * POISON_AFTER)
    assert Deaths.read(paths).is_poison(9)
    deaths = Deaths.read(paths, attempt=1)
    assert not deaths.is_poison(9) and not deaths.must_be_alone(9)
    record(paths, *[((9,), CRASH)] * POISON_AFTER, attempt=1)
    assert Deaths.read(paths, attempt=1).is_poison(9)


def test_damaged_record_counts_for_nothing(paths):
    record(paths, *[((9,), CRASH)] * POISON_AFTER)
    data = paths.death("r0-0").read_bytes()
    for broken in (b"", data[:9], b"[]", b'{"rows": 3}'):
        paths.death("r0-0").write_bytes(broken)
        assert not Deaths.read(paths).is_poison(9)
    paths.death("r0-0").write_bytes(data)
    assert Deaths.read(paths).is_poison(9)


DEATHS = st.tuples(st.frozensets(st.integers(0, 3), min_size=1), st.sampled_from([CRASH, HUNG, KILLED, NODE_LOST]))


@settings(max_examples=80, deadline=None)
@given(st.lists(DEATHS, max_size=16))
def test_rules_hold_for_any_history(history):
    with tempfile.TemporaryDirectory() as folder:
        paths = empty_job(Path(folder))
        record(paths, *history)
        deaths = Deaths.read(paths)
    alone = Counter(row for rows, cause in history if cause in (CRASH, HUNG) and len(rows) == 1 for row in rows)
    every = Counter(row for rows, _ in history for row in rows)
    for row in range(4):
        assert deaths.is_poison(row) == (alone[row] >= POISON_AFTER)
        assert deaths.must_be_alone(row) == (every[row] >= ALONE_AFTER)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.frozensets(st.integers(0, 3), min_size=1), st.sampled_from([KILLED, NODE_LOST])),
                max_size=40))
def test_kills_from_outside_never_make_an_error(history):
    with tempfile.TemporaryDirectory() as folder:
        paths = empty_job(Path(folder))
        record(paths, *history)
        deaths = Deaths.read(paths)
    assert not any(map(deaths.is_poison, range(4)))


def test_killed_leader_is_recorded_while_others_read(paths):
    """Several starts that see the same death record it once."""
    die_in_child(paths, "a.0", "os.kill(os.getpid(), signal.SIGSEGV)", 4)
    readers = [Deaths(paths) for _ in range(3)]
    for reader in readers:
        reader.refresh()
    assert len(list(paths.deaths.iterdir())) == 1
    assert all(reader._counts[4] == (1, 1) for reader in readers)


@pytest.mark.parametrize(("code", "words"), [
    ("os.kill(os.getpid(), signal.SIGSEGV)", ["Segmentation fault", "<string>"]),
    ("raise ValueError('what broke')", ["ValueError: what broke", "<string>"]),
])
def test_log_says_what_crashed_in_a_few_lines(code, words, paths, caplog):
    die_in_child(paths, "a.0", code, 4)
    Deaths.read(paths)
    (line,) = [record.getMessage() for record in caplog.records]
    assert all(word in line for word in [*words, "rank died", "1 rows"]) and len(line.splitlines()) <= 8


def test_signals_that_end_a_rank_leave_a_traceback_of_all_threads(paths):
    end = time.monotonic() + 30
    run = die_in_child(paths, "a.0", f"os.kill(os.getpid(), {int(signal.SIGFPE)})", 4)
    assert run.returncode == -signal.SIGFPE and time.monotonic() < end
    assert "Floating" in read_left(paths, "a.0").crash
