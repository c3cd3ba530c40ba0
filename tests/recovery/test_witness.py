"""The witness of a rank, through the epochs of its replica."""

import json
import os
import signal
import subprocess
import sys

import pytest

from hpcinfer.recovery.deaths import CRASH, HUNG, KILLED, POISON_AFTER, cause_of
from hpcinfer.recovery.inflight import list_left, read_left
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.witness import Witness


@pytest.fixture
def paths(tmp_path) -> JobPaths:
    paths = JobPaths(tmp_path / "out.jsonl")
    paths.create()
    return paths


def causes(paths: JobPaths) -> dict[str, str]:
    if not paths.deaths.exists():
        return {}
    return {path.stem: json.loads(path.read_bytes())["cause"] for path in sorted(paths.deaths.iterdir())}


def die(paths: JobPaths, signal_number: int, *, row: int, start: str) -> None:
    """A replica of one rank that dies with a row in flight."""
    program = f"""
import os
from pathlib import Path
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.witness import Witness
with Witness(JobPaths(Path({str(paths.output)!r})), {start!r}) as witness:
    witness.serve(0, 1, part="p")
    witness.opened({row})
    os.kill(os.getpid(), {int(signal_number)})
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert run.returncode == -signal_number, run.stderr


def test_good_end_leaves_nothing(paths):
    with Witness(paths, "start") as leader, Witness(paths, "start") as follower:
        leader.serve(0, 1, part="p")
        follower.serve(0, 1)
        leader.opened(4)
        assert read_left(paths, "start.0-1").rows == (4,)
        leader.closed(4)
    assert list(paths.inflight.iterdir()) == [] and not paths.deaths.exists()


def test_rank_that_never_serves_writes_nothing(paths):
    with Witness(paths, "start") as witness:
        witness.opened(1)
        witness.closed(1)
    assert not paths.inflight.exists()


def test_leader_that_survives_records_the_death_and_goes_on(paths):
    with Witness(paths, "start") as witness:
        witness.serve(2, 1, part="p")
        witness.opened(4)
        witness.serve(2, 5, part="p", rows=[4])
        assert causes(paths) == {"start.2-1": KILLED}
        assert list_left(paths) == ["start.2-5"] and read_left(paths, "start.2-5").rows == (4,)
        witness.opened(4)  # a row that is in flight already counts once
        witness.closed(4)
        assert read_left(paths, "start.2-5").rows == ()
    assert list(paths.inflight.iterdir()) == []


def test_new_leader_records_the_death_of_the_old_one(paths):
    dead, heir = Witness(paths, "start"), Witness(paths, "start")
    with heir:
        dead.serve(0, 1, part="p")
        heir.serve(0, 1)
        dead.opened(4)
        dead._crash.note("Fatal Python error: Segmentation fault")  # its last word
        heir.serve(0, 2, part="q", rows=[4])
        assert causes(paths) == {"start.0-1": CRASH}
        assert read_left(paths, "start.0-2")[2:5] == ("q", 0, (4,))
    dead._crash.close()


def test_leader_that_follows_from_now_on_has_no_rows(paths):
    with Witness(paths, "start") as witness:
        witness.serve(0, 1, part="p")
        witness.serve(1, 2)
        assert list_left(paths) == ["start.0-1"]  # for its heir to record
        witness.opened(4)
        assert read_left(paths, "start.0-1").rows == ()


def test_hang_is_noted(paths):
    with Witness(paths, "start") as leader, Witness(paths, "start") as follower:
        follower.hung("nothing is open yet")
        leader.serve(0, 1, part="p")
        follower.serve(0, 1)
        follower.hung("in all_reduce")
        assert cause_of(read_left(paths, "start.0-1")) == HUNG


def test_error_of_its_own_is_taken_down(paths):
    with pytest.raises(RuntimeError), Witness(paths, "start") as witness:
        witness.serve(0, 1, part="p")
        witness.opened(4)
        raise RuntimeError("broken")
    left = read_left(paths, "start.0-1")
    assert left.rows == (4,) and "RuntimeError: broken" in left.crash


def test_next_starts_learn_what_earlier_ones_died_of(paths):
    for number in range(POISON_AFTER):
        die(paths, signal.SIGSEGV, row=4, start=f"s{number}")
    die(paths, signal.SIGKILL, row=5, start="t")
    with Witness(paths, "last") as witness:
        witness.serve(0, 1, part="p")
        assert witness.is_poison(4) and witness.must_be_alone(4)
        assert not witness.is_poison(5) and not witness.must_be_alone(5)
        die(paths, signal.SIGKILL, row=5, start="more")
        assert not witness.must_be_alone(5)
        witness.refresh()
        assert witness.must_be_alone(5)
    assert sorted(causes(paths).values()) == sorted([CRASH] * POISON_AFTER + [KILLED] * 2)
    assert os.listdir(paths.inflight) == []
