"""Snapshots: what was saved comes back whole, or the row begins anew; nobody is hurt by a file that is not right."""

import errno
import json
import os
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.config import SamplingParams
from hpcinfer.recovery.feeder import _fits
from hpcinfer.recovery.index import build_index
from hpcinfer.recovery.snapshots import Snapshots, Unfinished, _join, remove_snapshots

OUTPUTS = {3: ((5, 6, 7),), 4: ((1,), (2, 3)), 8: ((2**31 - 1, 0),)}


@pytest.fixture
def job(make_job):
    paths, index = make_job(40)
    return paths, index


def unfinished(index, outputs):
    blocks = index.block_of_rows()
    return [Unfinished(row, int(blocks[row]), ids) for row, ids in outputs.items()]


def read(paths, index, rows=range(40), attempt=0):
    snapshots, blocks = Snapshots(paths, index, attempt), index.block_of_rows()
    found = {row: snapshots.resumed(row, int(blocks[row])) for row in rows}
    return {row: outputs for row, outputs in found.items() if outputs}


def files_of(paths):
    return sorted(paths.snapshots.rglob("*.json"))


def test_rows_go_on_where_they_were(job):
    paths, index = job
    saved = Snapshots(paths, index, 0).save(unfinished(index, OUTPUTS))
    assert saved == (4, 8)
    assert read(paths, index) == OUTPUTS


def test_job_without_snapshots_begins_anew(job):
    assert read(*job) == {}
    assert not job[0].snapshots.exists()


def test_rows_without_a_token_are_not_saved(job):
    paths, index = job
    assert Snapshots(paths, index, 0).save(unfinished(index, {1: (), 2: ((), ())})) == (0, 0)
    assert not paths.snapshots.exists()


def test_choice_without_a_token_is_saved_with_its_row_and_not_counted(job):
    paths, index = job
    outputs = {2: ((), (7, 8))}
    assert Snapshots(paths, index, 0).save(unfinished(index, outputs)) == (1, 2)
    assert read(paths, index) == outputs


def test_of_several_snapshots_the_longest_counts_for_each_choice(job):
    paths, index = job
    for outputs in ({4: ((1, 9), (2,))}, {4: ((1,), (2, 3, 4))}, {4: ((1,), (2,))}):
        Snapshots(paths, index, 0).save(unfinished(index, outputs))
    assert read(paths, index) == {4: ((1, 9), (2, 3, 4))}


@pytest.mark.parametrize("other", [((7, 6),), ((5, 6), (7,))])
def test_snapshots_that_contradict_each_other_count_not_at_all(job, caplog, other):
    paths, index = job
    for outputs in ({3: ((5, 6, 7),), 8: ((1,),)}, {3: other}, {3: ((5,),)}):
        Snapshots(paths, index, 0).save(unfinished(index, outputs))
    assert read(paths, index) == {8: ((1,),)}
    assert "rows [3] differ" in caplog.text


def test_file_cut_anywhere_is_ignored(job):
    paths, index = job
    Snapshots(paths, index, 0).save(unfinished(index, {3: ((5, 6, 7),)}))
    (path,) = files_of(paths)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert read(paths, index, [3]) == {}
    path.write_bytes(data)
    assert read(paths, index, [3]) == {3: ((5, 6, 7),)}


def test_file_with_any_flipped_bit_is_ignored(job):
    paths, index = job
    Snapshots(paths, index, 0).save(unfinished(index, {3: ((5, 6, 7),)}))
    (path,) = files_of(paths)
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        assert read(paths, index, [3]) == {}


def test_row_that_has_changed_begins_anew(job, tmp_path):
    paths, index = job
    Snapshots(paths, index, 0).save(unfinished(index, OUTPUTS))
    lines = (tmp_path / "prompts.txt").read_text().splitlines()
    lines[4] = "prompt X"
    (tmp_path / "prompts.txt").write_text("\n".join(lines) + "\n")
    paths.index.unlink()
    other = build_index(paths, tmp_path / "prompts.txt", "text", SerialGroup())
    assert read(paths, other) == {row: ids for row, ids in OUTPUTS.items() if row != 4}


def test_snapshots_of_another_attempt_or_format_do_not_count(job):
    paths, index = job
    Snapshots(paths, index, 0).save(unfinished(index, OUTPUTS))
    assert read(paths, index, attempt=1) == {}
    for path in files_of(paths):
        record = json.loads(path.read_bytes().splitlines()[0])
        data = json.dumps({**record, "version": 2, "rows": "other"}).encode()
        path.write_bytes(data + b"\n%08x\n" % zlib.crc32(data))
    assert read(paths, index) == {}


def test_file_that_vanishes_or_cannot_be_read_is_ignored(job, caplog):
    paths, index = job
    Snapshots(paths, index, 0).save(unfinished(index, {3: ((5, 6, 7),)}))
    (path,) = files_of(paths)
    path.rename(path.with_name("kept"))
    path.symlink_to("nowhere")  # listed, and not there
    assert read(paths, index, [3]) == {}
    assert not caplog.text
    path.unlink()
    path.mkdir()
    assert read(paths, index, [3]) == {}
    assert "cannot be read" in caplog.text


def test_file_system_that_refuses_costs_only_the_snapshot(job, caplog, monkeypatch):
    paths, index = job

    def refuse(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hpcinfer.recovery.snapshots.publish_bytes", refuse)
    assert Snapshots(paths, index, 0).save(unfinished(index, OUTPUTS)) == (0, 0)
    assert "cannot be kept, and will begin anew" in caplog.text and "No space left" in caplog.text


@pytest.mark.parametrize(("outputs", "changes", "goes_on"), [
    (((1, 2),), {}, True), (((), (3,)), {"n": 2}, True), ((), {}, False),
    (((1,), (2,)), {}, False), (((1,),), {"n": 2}, False), (((1, 2),), {"max_tokens": 2}, False),
    (((1,),), {"logprobs": 0}, False),
])  # fmt: skip
def test_row_goes_on_only_where_its_tokens_tell_all_of_it(outputs, changes, goes_on):
    assert _fits(outputs, SamplingParams(**changes)) == goes_on


def test_removed_snapshots_are_gone_and_removing_none_is_no_error(job):
    paths, index = job
    Snapshots(paths, index, 0).save(unfinished(index, OUTPUTS))
    remove_snapshots(paths)
    remove_snapshots(paths)
    assert read(paths, index) == {} and not paths.snapshots.exists()


def test_a_block_is_read_once_while_its_rows_are_opened(job, monkeypatch):
    paths, index = job
    blocks = index.block_of_rows()
    snapshots = Snapshots(paths, index, 0)
    reads = []
    monkeypatch.setattr(snapshots, "_read", lambda block: reads.append(block) or {})
    rows = sorted(range(40), key=lambda row: blocks[row])
    assert all(snapshots.resumed(row, int(blocks[row])) == () for row in rows)
    assert reads == sorted(set(blocks.tolist()))


IDS = st.lists(st.integers(0, 9), max_size=4).map(tuple)


@given(whole=st.lists(IDS, min_size=1, max_size=3), cuts=st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3)))
def test_beginnings_of_one_story_join_in_any_order_to_the_longest(whole, cuts):
    parts = [tuple(ids[:cut] for ids, cut in zip(whole, each, strict=False)) for each in cuts]
    joined = tuple(() for _ in whole)
    for part in parts:
        joined = _join(joined, part)
    assert joined == tuple(max((part[i] for part in parts), key=len, default=()) for i in range(len(whole)))


@given(one=IDS, other=IDS)
def test_two_stories_join_only_if_one_begins_the_other(one, other):
    is_beginning = one == other[: len(one)] or other == one[: len(other)]
    assert _join((one,), (other,)) == ((max(one, other, key=len),) if is_beginning else ())
