import os

import pytest

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
        raise OSError("no room")

    monkeypatch.setattr(os, broken, refuse)
    with pytest.raises(OSError, match="no room"):
        write(tmp_path / "a", b"data")
    assert os.listdir(tmp_path) == []


def test_write_all_at_an_offset(tmp_path):
    descriptor = create(tmp_path / "a")
    write_all(descriptor, b"world", 5)
    write_all(descriptor, b"hello")
    os.close(descriptor)
    assert (tmp_path / "a").read_bytes() == b"helloworld"
