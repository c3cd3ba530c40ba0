import os

from hpcinfer.recovery.durable import (
    create,
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


def test_write_all_at_an_offset(tmp_path):
    descriptor = create(tmp_path / "a")
    write_all(descriptor, b"world", 5)
    write_all(descriptor, b"hello")
    os.close(descriptor)
    assert (tmp_path / "a").read_bytes() == b"helloworld"
