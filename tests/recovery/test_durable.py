import errno
import os
import threading

import pytest

from hpcinfer.errors import JobDirectoryError
from hpcinfer.recovery import patience
from hpcinfer.recovery.durable import (
    create,
    list_names,
    publish_bytes,
    remove_abandoned,
    replace_bytes,
    temporary_path,
    write_all,
    write_new,
)


def test_first_to_publish_keeps_the_name(tmp_path):
    assert publish_bytes(tmp_path / "a", b"first")
    assert not publish_bytes(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a"]


def test_replace_leaves_one_file(tmp_path):
    replace_bytes(tmp_path / "a", b"first")
    replace_bytes(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["a"]


def test_files_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        publish_bytes(tmp_path / "a", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_only_old_temporary_files_are_removed(tmp_path):
    target = tmp_path / "out[1].jsonl"
    old, new, other = temporary_path(target), temporary_path(target), temporary_path(tmp_path / "b")
    for path in (old, new, other):
        write_new(path, b"x")
    for path in (old, other):
        os.utime(path, (0, 0))
    remove_abandoned(target)
    assert sorted(tmp_path.iterdir()) == sorted([new, other])


def test_listing_a_directory_removes_old_temporary_files(tmp_path):
    old, new = temporary_path(tmp_path / "a"), temporary_path(tmp_path / "a")
    for path in (old, new, tmp_path / "b"):
        write_new(path, b"x")
    for path in (old, tmp_path / "b"):
        os.utime(path, (0, 0))
    assert list_names(tmp_path) == ["b"]
    assert sorted(tmp_path.iterdir()) == sorted([new, tmp_path / "b"])


@pytest.mark.parametrize("write", [publish_bytes, replace_bytes])
@pytest.mark.parametrize("broken", ["write", "fsync"])
def test_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, write, broken):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(os, broken, refuse)
    with pytest.raises(OSError, match=f"no room: .*{tmp_path}/.a"):
        write(tmp_path / "a", b"data")
    assert os.listdir(tmp_path) == []


def test_write_all_at_an_offset(tmp_path):
    descriptor = create(tmp_path / "a")
    write_all(descriptor, b"world", 5)
    write_all(descriptor, b"hello")
    os.close(descriptor)
    assert (tmp_path / "a").read_bytes() == b"helloworld"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(patience, "_FIRST_PAUSE_S", 0.001)


class Away:
    """A function of `os` that fails at its first calls, before its work or after it, as when an answer is lost."""

    def __init__(self, function, *, times=2, is_done=False, number=errno.EIO):
        self._function, self._left, self._is_done, self._number = function, times, is_done, number

    def __call__(self, *arguments, **options):
        self._left -= 1
        if self._left < 0:
            return self._function(*arguments, **options)
        if self._is_done and self._left == 1:
            self._function(*arguments, **options)
        raise OSError(self._number, os.strerror(self._number))


@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize("name", ["write", "fsync", "link", "stat", "unlink", "open", "listdir"])
def test_name_that_is_given_while_the_file_system_goes_away_is_ours(tmp_path, monkeypatch, name, is_done):
    monkeypatch.setattr(os, name, Away(getattr(os, name), is_done=is_done))
    assert publish_bytes(tmp_path / "a", b"data")
    assert list_names(tmp_path) == ["a"]
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == b"data"
    assert not publish_bytes(tmp_path / "a", b"other")


@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize("name", ["write", "fsync", "replace", "stat"])
def test_file_that_is_replaced_while_the_file_system_goes_away_is_whole(tmp_path, monkeypatch, name, is_done):
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, name, Away(getattr(os, name), is_done=is_done))
    replace_bytes(tmp_path / "a", b"data")
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == b"data" and os.listdir(tmp_path) == ["a"]


def test_directory_that_is_not_there_for_a_moment_is_waited_for(tmp_path):
    place, away = tmp_path / "here", tmp_path / "away"
    place.mkdir()
    place.rename(away)
    threading.Timer(0.3, lambda: away.rename(place)).start()
    assert publish_bytes(place / "a", b"data") and list_names(place) == ["a"]


@pytest.mark.parametrize(("number", "error", "words"), [
    (errno.EPERM, JobDirectoryError, "hard links"),
    (errno.ENOSPC, OSError, "No space left"),
    (errno.EDQUOT, OSError, "quota"),
    (errno.EACCES, OSError, "Permission denied"),
])
def test_refusal_of_a_link_is_what_the_system_says(tmp_path, monkeypatch, number, error, words):
    monkeypatch.setattr(os, "link", Away(os.link, number=number))
    with pytest.raises(error, match=words):
        publish_bytes(tmp_path / "a", b"data")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.EROFS])
def test_temporary_file_that_is_not_ours_to_remove_is_left_alone(tmp_path, monkeypatch, number):
    old = temporary_path(tmp_path / "a")
    write_new(old, b"x")
    os.utime(old, (0, 0))
    monkeypatch.setattr(os, "unlink", Away(os.unlink, number=number))
    assert list_names(tmp_path) == []
    assert old.exists()
