import errno
import itertools
import json
import os
import threading
import time

import pytest

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.errors import JobDirectoryError, PeerError, storage_error
from hpcinfer.recovery import copying, merging, patience
from hpcinfer.recovery.attempts import current_attempt, open_attempt
from hpcinfer.recovery.claims import Claimer
from hpcinfer.recovery.durable import replace_bytes
from hpcinfer.recovery.journal import PartWriter
from hpcinfer.recovery.leases import Lease
from hpcinfer.recovery.merging import merge, read_complete
from hpcinfer.recovery.progress import progress

GROUP = SerialGroup()


def _text(row):
    return json.dumps({"row": row, "text": "x" * (row * 37 % 101)}).encode()


def _write(paths, part, rows, *, generation=1, attempt=0, text=_text, is_error=False):
    with PartWriter(paths, part, attempt) as writer:
        for row in rows:
            writer.append(row, generation, text(row), is_error=is_error)


def _expected(rows, text=_text):
    return b"".join(text(row) + b"\n" for row in rows)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_output_is_in_input_order_with_any_number_of_ranks(make_job, ranks, monkeypatch, size):
    monkeypatch.setattr(copying, "_CHUNK_BYTES", 500)
    monkeypatch.setattr(copying, "_WINDOW_BYTES", 300)
    monkeypatch.setattr(copying, "_GAP_BYTES", 100)
    paths, _ = make_job(100)
    for part, rows in {"a": range(99, -1, -3), "b": range(1, 100, 3), "c": range(2, 100, 3)}.items():
        _write(paths, part, [row for row in rows if row % 3 == "abc".index(part)])
    reports = ranks(size, lambda group: merge(paths, paths.output, group))
    assert paths.output.read_bytes() == _expected(range(100))
    assert len(set(reports)) == 1 and reports[0][:3] == (100, 100, 0)
    assert read_complete(paths) == reports[0]


def test_more_ranks_than_rows(make_job, ranks):
    paths, _ = make_job(2)
    _write(paths, "a", [1, 0])
    ranks(4, lambda group: merge(paths, paths.output, group))
    assert paths.output.read_bytes() == _expected(range(2))


def test_missing_rows_are_counted_and_nothing_is_written(make_job):
    paths, _ = make_job(10)
    _write(paths, "a", range(7))
    with pytest.raises(JobDirectoryError, match="3 of 10 rows are not finished"):
        merge(paths, paths.output, GROUP)
    assert not paths.output.exists() and read_complete(paths) is None


def test_partial_merge_gives_finished_rows_and_does_not_end_the_job(make_job, tmp_path):
    paths, _ = make_job(10)
    _write(paths, "a", [8, 3])
    report = merge(paths, tmp_path / "some", GROUP, partial=True)
    assert (tmp_path / "some").read_bytes() == _expected([3, 8])
    assert (report.num_rows, report.num_done) == (10, 2) and read_complete(paths) is None


def test_partial_merge_of_nothing_is_an_empty_file(make_job, tmp_path):
    paths, _ = make_job(10)
    assert merge(paths, tmp_path / "some", GROUP, partial=True).num_done == 0
    assert (tmp_path / "some").read_bytes() == b""


def test_rows_done_twice_alike_are_counted(make_job):
    paths, _ = make_job(10)
    _write(paths, "a", [*range(10), 4])
    _write(paths, "b", range(3), generation=2)
    report = merge(paths, paths.output, GROUP)
    assert (report.num_overlaps, report.num_conflicts) == (4, 0)
    assert paths.output.read_bytes() == _expected(range(10))


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_of_two_different_lines_the_lower_generation_wins(make_job, names, caplog):
    paths, _ = make_job(3)
    _write(paths, names[0], range(3), generation=2, text=lambda row: b"second")
    _write(paths, names[1], range(2), generation=1, text=lambda row: b"first")
    report = merge(paths, paths.output, GROUP)
    assert paths.output.read_bytes() == b"first\nfirst\nsecond\n"
    assert report.num_conflicts == 2 and "different results" in caplog.text


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_highest_attempt_wins_and_is_no_conflict(make_job, names):
    paths, _ = make_job(3)
    _write(paths, "c", [1, 2])
    _write(paths, names[0], [0], generation=3, attempt=1)
    _write(paths, names[1], [0], generation=1, text=lambda row: b"error", is_error=True)
    report = merge(paths, paths.output, GROUP)
    assert paths.output.read_bytes() == _expected(range(3))
    assert report.num_conflicts == 0 and report.num_failed == 0


def _damage(paths, part, *offsets):
    data = bytearray(paths.part_data(part).read_bytes())
    for offset in offsets:
        data[offset] ^= 1
    paths.part_data(part).write_bytes(data)


def test_flipped_byte_is_named_and_nothing_is_written(make_job):
    paths, _ = make_job(10)
    _write(paths, "a", range(10))
    _damage(paths, "a", len(_expected(range(4))) + 2)
    with pytest.raises(JobDirectoryError) as caught:
        merge(paths, paths.output, GROUP)
    assert f"byte {len(_expected(range(4)))}" in str(caught.value) and "a.jsonl" in str(caught.value)
    assert sorted(item.name for item in paths.output.parent.iterdir()) == ["completions.jsonl.job", "prompts.txt"]


@pytest.mark.parametrize("size", [1, 3])
def test_rows_of_damaged_lines_are_computed_again(make_job, ranks, size):
    paths, index = make_job(10)
    _write(paths, "a", range(10))
    _damage(paths, "a", *(len(_expected(range(row))) for row in (2, 3, 8)))
    errors = ranks(size, lambda group: merge(paths, paths.output, group))
    assert all(isinstance(error, JobDirectoryError | PeerError) for error in errors)
    assert progress(paths).num_unfinished == 3
    with pytest.raises(JobDirectoryError, match="3 of 10 rows are not finished"):
        merge(paths, paths.output, GROUP)
    with Lease(paths.leases, 100) as lease:
        claimer = Claimer(paths, index, lease)
        while (claim := claimer.claim()) is not None:
            assert set(claim.rows.tolist()) <= {2, 3, 8}
            _write(paths, f"b{claim.block}", claim.rows.tolist(), generation=claim.generation)
    assert merge(paths, paths.output, GROUP).num_unfinished == 0
    assert paths.output.read_bytes() == _expected(range(10))


def test_damaged_line_of_a_row_that_has_another_one_costs_nothing(make_job):
    paths, _ = make_job(3)
    _write(paths, "a", range(3))
    _write(paths, "b", [1], generation=2)
    _damage(paths, "a", len(_expected(range(1))))
    with pytest.raises(JobDirectoryError, match="not what was written"):
        merge(paths, paths.output, GROUP)
    assert merge(paths, paths.output, GROUP).num_done == 3
    assert paths.output.read_bytes() == _expected(range(3))


def test_damage_is_named_where_nothing_may_be_noted(make_job, tmp_path, monkeypatch, caplog):
    def refuse(*arguments):
        raise PermissionError("read only")

    paths, _ = make_job(3)
    _write(paths, "a", range(3))
    _damage(paths, "a", 0)
    monkeypatch.setattr(copying, "void_lines", refuse)
    with pytest.raises(JobDirectoryError, match="not what was written"):
        merge(paths, tmp_path / "copy", GROUP)
    assert "read only" in caplog.text


def test_output_that_was_changed_is_not_complete(make_job):
    paths, _ = make_job(3)
    _write(paths, "a", range(3))
    report = merge(paths, paths.output, GROUP)
    assert read_complete(paths) == report
    os.truncate(paths.output, report.size_bytes - 1)
    assert read_complete(paths) is None
    assert merge(paths, paths.output, GROUP) == report == read_complete(paths)


def test_merge_killed_at_any_moment_leaves_no_output_or_a_whole_one(make_job, children):
    paths, _ = make_job(3000)
    _write(paths, "a", range(3000))
    start = time.monotonic()
    merge(paths, paths.output, GROUP)
    duration_s = time.monotonic() - start
    for step in range(8):
        paths.output.unlink(missing_ok=True)
        pid = children.start(lambda: merge(paths, paths.output, GROUP) and None)
        time.sleep(duration_s * step / 6)
        children.kill(pid)
        assert not paths.output.exists() or paths.output.read_bytes() == _expected(range(3000))
    merge(paths, paths.output, GROUP)
    assert paths.output.read_bytes() == _expected(range(3000))


def test_retry_opens_one_attempt_and_continues_one_that_was_interrupted(make_job):
    paths, index = make_job(4)
    assert open_attempt(paths, index, GROUP, retry_errors=True) == 0
    _write(paths, "a", [0, 1])
    _write(paths, "b", [2, 3], is_error=True)
    assert open_attempt(paths, index, GROUP, retry_errors=False) == 0
    assert open_attempt(paths, index, GROUP, retry_errors=True) == 1
    _write(paths, "c", [2], attempt=1, is_error=True)
    assert open_attempt(paths, index, GROUP, retry_errors=True) == 1
    _write(paths, "d", [3], attempt=1)
    assert open_attempt(paths, index, GROUP, retry_errors=True) == 2 == current_attempt(paths)


@pytest.mark.parametrize("size", [1, 2])
def test_interrupted_retry_is_not_complete(make_job, ranks, size):
    paths, index = make_job(4)
    _write(paths, "a", range(4), is_error=True)
    assert merge(paths, paths.output, GROUP).num_failed == 4
    assert open_attempt(paths, index, GROUP, retry_errors=True) == 1
    _write(paths, "b", [2, 3], attempt=1)
    first = ranks(size, lambda group: merge(paths, paths.output, group))[0]
    assert "2 of 4 rows are not finished in retry 1" in str(first)
    merge(paths, paths.output, GROUP, partial=True)
    assert read_complete(paths) is None
    numbers = progress(paths)
    assert (numbers.is_merged, numbers.num_unfinished, numbers.num_done) == (False, 2, 4)
    assert open_attempt(paths, index, GROUP, retry_errors=True) == 1
    _write(paths, "c", [0, 1], attempt=1, is_error=True)
    assert merge(paths, paths.output, GROUP).num_failed == 2
    assert read_complete(paths).attempt == 1 and progress(paths).is_merged


def test_attempt_that_another_job_opens_during_the_merge_is_not_complete(make_job, monkeypatch):
    paths, index = make_job(2)
    _write(paths, "a", [0, 1], is_error=True)

    def open_and_replace(*arguments):
        open_attempt(paths, index, GROUP, retry_errors=True)
        replace_bytes(*arguments)

    monkeypatch.setattr(merging, "replace_bytes", open_and_replace)
    assert merge(paths, paths.output, GROUP).attempt == 0
    assert read_complete(paths) is None and not progress(paths).is_merged


def test_new_attempt_makes_the_last_merge_incomplete(make_job):
    paths, index = make_job(2)
    _write(paths, "a", [0, 1], is_error=True)
    assert merge(paths, paths.output, GROUP).num_failed == 2
    assert read_complete(paths)
    open_attempt(paths, index, GROUP, retry_errors=True)
    assert read_complete(paths) is None


def test_output_that_is_a_link_is_written_where_it_points(make_job, tmp_path):
    paths, index = make_job(5)
    _write(paths, "a", range(5))
    (tmp_path / "scratch").mkdir()
    paths.output.symlink_to(tmp_path / "scratch" / "real.jsonl")
    merge(paths, paths.output, SerialGroup())
    assert paths.output.is_symlink()
    assert (tmp_path / "scratch" / "real.jsonl").read_bytes() == _expected(range(5))
    assert read_complete(paths)


class Away:
    """A function of `os` that fails at some of its calls."""

    def __init__(self, function, fails_at, number=errno.EIO):
        self._function, self._fails_at, self._number, self.num_calls = function, fails_at, number, 0

    def __call__(self, *arguments, **options):
        self.num_calls += 1
        if self.num_calls in self._fails_at:
            raise OSError(self._number, os.strerror(self._number))
        return self._function(*arguments, **options)


@pytest.mark.parametrize("name", ["open", "pread", "pwrite", "fsync", "ftruncate", "replace", "stat", "listdir"])
def test_file_system_that_is_away_for_moments_changes_nothing(make_job, monkeypatch, name):
    monkeypatch.setattr(patience, "_FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(copying, "_CHUNK_BYTES", 500)
    paths, _ = make_job(50)
    _write(paths, "a", range(50))
    for first in itertools.count(1):
        away = Away(getattr(os, name), {first, first + 1})
        with monkeypatch.context() as patch:
            patch.setattr(os, name, away)
            report = merge(paths, paths.output, GROUP)
        assert report.num_done == 50 and paths.output.read_bytes() == _expected(range(50))
        if away.num_calls < first:
            break
        for path in (paths.output, paths.complete):
            path.unlink()
    assert first > 1
    assert sorted(item.name for item in paths.output.parent.iterdir()) == [
        "completions.jsonl", "completions.jsonl.job", "prompts.txt"]


@pytest.mark.parametrize("name", ["pwrite", "fsync", "ftruncate"])
def test_full_disk_is_named_and_leaves_nothing(make_job, monkeypatch, name):
    paths, _ = make_job(10)
    _write(paths, "a", range(10))
    with monkeypatch.context() as patch:
        patch.setattr(os, name, Away(getattr(os, name), {1}, errno.ENOSPC))
        with pytest.raises(OSError, match="completions.jsonl") as caught:
            merge(paths, paths.output, GROUP)
    assert "make room" in str(storage_error(caught.value))
    assert sorted(item.name for item in paths.output.parent.iterdir()) == ["completions.jsonl.job", "prompts.txt"]
    assert merge(paths, paths.output, GROUP).num_done == 10


def test_byte_that_is_wrong_in_memory_only_is_read_again(make_job, monkeypatch):
    paths, _ = make_job(10)
    _write(paths, "a", range(10))
    pread, flips = os.pread, [True]

    def read(*arguments):
        data = pread(*arguments)
        return bytes([data[0] ^ 1]) + data[1:] if flips and flips.pop() else data

    monkeypatch.setattr(os, "pread", read)
    merge(paths, paths.output, GROUP)
    assert not flips and paths.output.read_bytes() == _expected(range(10))
    assert not list(paths.parts.glob("*.void"))


@pytest.mark.parametrize("size", [1, 3])
def test_rows_that_cannot_be_seen_yet_are_waited_for(make_job, ranks, tmp_path, size):
    """As where a node's cache still shows the names and sizes of a moment ago."""
    paths, _ = make_job(20)
    _write(paths, "a", range(10))
    _write(paths, "b", range(10, 20))
    os.rename(paths.part_sidecar("b"), tmp_path / "b")
    whole = paths.part_data("a").read_bytes()
    os.truncate(paths.part_data("a"), len(whole) // 2)

    def show():
        os.rename(tmp_path / "b", paths.part_sidecar("b"))
        paths.part_data("a").write_bytes(whole)

    threading.Timer(0.7, show).start()
    reports = ranks(size, lambda group: merge(paths, paths.output, group, patience_s=60))
    assert len(set(reports)) == 1 and reports[0].num_overlaps == 0
    assert paths.output.read_bytes() == _expected(range(20))


def test_rows_that_stay_away_are_missing(make_job, ranks):
    paths, _ = make_job(10)
    _write(paths, "a", range(7))
    start = time.monotonic()
    errors = ranks(2, lambda group: merge(paths, paths.output, group, patience_s=0.6))
    assert "3 of 10 rows are not finished" in str(errors[0])
    assert 0.6 < time.monotonic() - start < 20
