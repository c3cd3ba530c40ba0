import errno
import os

import h5py
import numpy as np
import pytest

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.errors import ConfigError, JobDirectoryError, PeerError
from hpcinfer.recovery import index as index_module
from hpcinfer.recovery.index import Index, build_index
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.scan import content_hash


def _line(row):
    return ("common beginning " * 20 if row % 3 == 0 else "") + f"prompt {row} " + "x" * (row % 17)


def test_spans_and_hashes_find_every_row(make_job, tmp_path):
    _, index = make_job(100, _line)
    data = (tmp_path / "prompts.txt").read_bytes()
    for row in range(100):
        offset, length = index.span(row)
        assert data[offset:offset + length] == _line(row).encode()
        assert index.content_hash(row) == content_hash(_line(row).encode())


def test_blocks_cover_all_rows(make_job):
    _, index = make_job(100, _line)
    blocks = [index.block_rows(block) for block in range(index.num_blocks)]
    assert sorted(np.concatenate(blocks).tolist()) == list(range(100))
    block_of_rows = index.block_of_rows()
    assert all((block_of_rows[rows] == block).all() for block, rows in enumerate(blocks))


@pytest.mark.parametrize("size", [2, 3, 7])
def test_index_does_not_depend_on_the_number_of_ranks(make_job, tmp_path, ranks, size):
    first, index = make_job(57, _line)
    paths = JobPaths(tmp_path / "other.jsonl")
    paths.create()
    found = ranks(size, lambda group: build_index(paths, tmp_path / "prompts.txt", "text", group))
    for other in found:
        assert all(other.span(row) == index.span(row) for row in range(57))
        assert all(other.content_hash(row) == index.content_hash(row) for row in range(57))
        assert other.num_blocks == index.num_blocks
        assert all(np.array_equal(other.block_rows(b), index.block_rows(b)) for b in range(index.num_blocks))


def test_jobs_that_start_at_once_keep_one_index(tmp_path, children):
    source, paths = tmp_path / "in.txt", JobPaths(tmp_path / "out.jsonl")
    source.write_text("a\nb\n" * 2000)
    paths.create()
    for _ in range(4):
        children.start(lambda: build_index(paths, source, "text", SerialGroup()) and None)
    children.wait()
    assert [item.name for item in paths.root.iterdir() if item.is_file()] == ["index.h5"]


def test_killed_build_leaves_no_index_and_the_next_one_works(tmp_path, children):
    source, paths = tmp_path / "in.txt", JobPaths(tmp_path / "out.jsonl")
    source.write_text("some text\n" * 60_000)
    paths.create()
    pid = children.start(lambda: build_index(paths, source, "text", SerialGroup()) and None)
    while not list(paths.root.glob(".index*")):
        pass
    children.kill(pid)
    assert build_index(paths, source, "text", SerialGroup()).num_rows == 60_000


def test_blank_input_is_refused_on_every_rank(tmp_path, ranks):
    source, paths = tmp_path / "in.txt", JobPaths(tmp_path / "out.jsonl")
    source.write_text("\n \n\t\n")
    paths.create()
    errors = ranks(2, lambda group: build_index(paths, source, "text", group))
    assert [type(error) for error in errors] == [ConfigError, PeerError]


def test_index_that_cannot_be_written_ends_every_rank(tmp_path, ranks, monkeypatch):
    source, paths = tmp_path / "in.txt", JobPaths(tmp_path / "out.jsonl")
    source.write_text("a\nb\n" * 50)
    paths.create()

    def refuse(*arguments):
        raise OSError("no room")

    for name in ("publish", "_allocate", "remove_abandoned"):
        with monkeypatch.context() as patch:
            patch.setattr(index_module, name, refuse)
            errors = ranks(3, lambda group: build_index(paths, source, "text", group))
        assert [type(error) for error in errors] == [OSError, PeerError, PeerError]
    assert not list(paths.root.glob("*index*"))
    assert [index.num_rows for index in ranks(3, lambda group: build_index(paths, source, "text", group))] == [100] * 3


def test_input_that_changed_is_refused(make_job, tmp_path):
    paths, _ = make_job(10)
    with (tmp_path / "prompts.txt").open("a") as file:
        file.write("more\n")
    with pytest.raises(ConfigError, match="must not change"):
        build_index(paths, tmp_path / "prompts.txt", "text", SerialGroup())


def test_damaged_index_is_named(make_job):
    paths, _ = make_job(10)
    data = paths.index.read_bytes()
    for size in (0, 100, len(data) // 2, len(data) - 1):
        paths.index.write_bytes(data[:size])
        with pytest.raises(JobDirectoryError, match="cannot be read"):
            Index.open(paths.index)


def test_only_the_root_asks_hdf5_and_the_others_are_told_where_the_columns_are(make_job, tmp_path, ranks, monkeypatch):
    paths, index = make_job(57, _line)
    opened, read_plan = [], index_module._read_plan
    monkeypatch.setattr(index_module, "_read_plan", lambda path: opened.append(path) or read_plan(path))
    source = tmp_path / "prompts.txt"
    found = ranks(3, lambda group: build_index(paths, source, "text", group))
    assert opened == [paths.index]
    for other in found:
        assert [other.span(row) for row in range(57)] == [index.span(row) for row in range(57)]
        assert other.block_of_rows().tolist() == index.block_of_rows().tolist()


def test_standard_tools_read_the_index(make_job):
    paths, index = make_job(10)
    with h5py.File(paths.index) as file:
        assert sorted(file) == ["block_starts", "hashes", "lengths", "offsets", "order"]
        assert file["order"].shape == (10,)


def test_index_is_read_again_after_the_file_system_was_away(make_job, monkeypatch):
    paths, index = make_job(57, _line)
    pread, fails = os.pread, [True, True]

    def read(*arguments):
        if fails and fails.pop():
            raise OSError(errno.EIO, "Input/output error")
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", read)
    assert sorted(row for block in range(index.num_blocks) for row in index.block_rows(block)) == list(range(57))
    assert not fails
