import errno
import json
import os
import signal
import threading
import time
from dataclasses import asdict, replace

import pytest

from hpcinfer.recovery import leases, patience
from hpcinfer.recovery.leases import Holder, Lease, LeaseObserver, read_lease


def _write(directory, name, holder, counter=1):
    (directory / name).write_text(f"{counter:020d}\n{json.dumps(asdict(holder))}\n")


def _elsewhere():
    return replace(Holder.this_process(), host="other", boot_id="another boot")


def test_counter_is_rewritten_in_place(tmp_path):
    with Lease(tmp_path, 0.4) as lease:
        path = tmp_path / lease.name
        inode, size, first = path.stat().st_ino, path.stat().st_size, read_lease(path)[0]
        deadline = time.monotonic() + 5
        while read_lease(path)[0] == first and time.monotonic() < deadline:
            time.sleep(0.01)
        counter, holder = read_lease(path)
        assert int(counter) > int(first) and holder == Holder.this_process()
        assert (path.stat().st_ino, path.stat().st_size) == (inode, size)
    assert os.listdir(tmp_path) == []


def test_ended_lease_is_dead_at_once(tmp_path):
    observer = LeaseObserver(tmp_path, 1000)
    with Lease(tmp_path, 1000) as lease:
        assert observer.is_alive(lease.name)
        assert observer.names() == [lease.name]
    assert not observer.is_alive(lease.name) and observer.names() == []


def test_lease_whose_counter_stands_still_is_stale_by_the_observers_clock(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    observer = LeaseObserver(tmp_path, 180)
    _write(tmp_path, "a", _elsewhere())
    os.utime(tmp_path / "a", (0, 0))  # what the file system says of its age does not count
    assert observer.is_alive("a")
    now[0] += 179
    assert observer.is_alive("a")
    now[0] += 2
    assert not observer.is_alive("a")
    _write(tmp_path, "a", _elsewhere(), counter=2)
    assert observer.is_alive("a")
    now[0] += 100
    assert observer.is_alive("a")


def test_process_that_is_gone_from_this_host_is_dead_at_once(tmp_path, children):
    pid = children.start(lambda: time.sleep(60))
    holder = replace(Holder.this_process(), pid=pid, start_time=_start_time(pid))
    _write(tmp_path, "a", holder)
    observer = LeaseObserver(tmp_path, 1000)
    assert observer.is_alive("a")
    children.kill(pid)
    assert not observer.is_alive("a")


def test_killed_process_that_is_not_buried_yet_is_dead(tmp_path, children):
    pid = children.start(lambda: time.sleep(60))
    holder = replace(Holder.this_process(), pid=pid, start_time=_start_time(pid))
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert holder.is_gone()


def test_pid_that_another_process_has_now_is_dead():
    holder = Holder.this_process()
    assert not holder.is_gone()
    assert replace(holder, start_time=holder.start_time - 1).is_gone()


@pytest.mark.parametrize("change", [{"boot_id": "x"}, {"pid_namespace": 1}, {"boot_id": ""}])
def test_processes_of_other_hosts_are_not_judged(change):
    assert not replace(Holder.this_process(), pid=2**22 + 1, **change).is_gone()


def test_unreadable_lease_ages_like_any_other(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    observer = LeaseObserver(tmp_path, 10)
    assert observer.is_alive("a")
    now[0] = 11.0
    assert not observer.is_alive("a")


def test_process_that_may_not_be_looked_at_is_not_gone(monkeypatch):
    """As with /proc mounted with hidepid, for other users' processes."""
    holder = Holder.this_process()
    monkeypatch.setattr(leases, "_start_time", lambda pid: None)
    assert holder.is_gone()
    monkeypatch.setattr(os, "kill", _refuse)
    assert not holder.is_gone()


def _refuse(*arguments):
    raise PermissionError


def test_lease_goes_on_after_its_file_system_was_away(tmp_path, monkeypatch, caplog):
    with Lease(tmp_path, 0.2) as lease, monkeypatch.context() as patch:
        path, failures, nowhere = tmp_path / lease.name, [], os.open(os.devnull, os.O_RDWR)

        def fail(descriptor):
            failures.append(descriptor)
            os.dup2(nowhere, descriptor)  # of no use any more
            raise OSError(errno.ESTALE, "Stale file handle")

        patch.setattr(os, "fsync", fail)
        _wait_for(lambda: len(failures) > 2)
        patch.undo()
        before = read_lease(path)[0]
        _wait_for(lambda: int(read_lease(path)[0]) > int(before) + 1)
        assert read_lease(path)[1] == Holder.this_process()
        _wait_for(lambda: "is back" in caplog.text)
    assert caplog.text.count("trying again") == 1


def test_lease_that_somebody_has_removed_does_not_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(patience, "LIMIT_S", 0.1)
    with Lease(tmp_path, 0.2) as lease:
        (tmp_path / lease.name).unlink()
        monkeypatch.setattr(os, "fsync", lambda descriptor: os.stat(tmp_path / "nothing"))
        time.sleep(0.3)
        assert os.listdir(tmp_path) == []


def test_leases_do_not_end_with_their_directory(tmp_path):
    place, away = tmp_path / "leases", tmp_path / "away"
    place.mkdir()
    _write(place, "a", _elsewhere())
    place.rename(away)
    threading.Timer(0.3, lambda: away.rename(place)).start()
    assert LeaseObserver(place, 1000).is_alive("a")


def test_time_in_which_nobody_can_look_does_not_count(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    _write(tmp_path, "a", _elsewhere())
    observer, read = LeaseObserver(tmp_path, 180), read_lease

    def read_late(path):
        now[0] += 400  # as a file system does that lets everybody wait
        return read(path)

    assert observer.is_alive("a")
    monkeypatch.setattr(leases, "read_lease", read_late)
    assert observer.is_alive("a")
    monkeypatch.setattr(leases, "read_lease", read)
    now[0] += 179
    assert observer.is_alive("a")
    now[0] += 2
    assert not observer.is_alive("a")


def _wait_for(is_true):
    end = time.monotonic() + 20
    while not is_true() and time.monotonic() < end:
        time.sleep(0.005)
    assert is_true()


def _start_time(pid):
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])
