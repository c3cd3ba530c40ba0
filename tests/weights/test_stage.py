import errno
import logging
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from hpcinfer.weights import stage as stage_module
from hpcinfer.weights.reader import Store, UnitRead
from hpcinfer.weights.stage import Stage

Q = "layers.1.q_proj.weight"


def read_all(store):
    """All units of a store, each parameter's as bytes."""
    values = {name: store.empty(name, len(param.checksums)) for name, param in store.parameters.items()}
    store.read_into([UnitRead(name, unit, each) for name, held in values.items() for unit, each in enumerate(held)])
    return {name: held.tobytes() for name, held in values.items()}


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    monkeypatch.setattr(stage_module, "_IDLE_S", 0.02)


@pytest.fixture(scope="module")
def plain(tiny_store):
    with Store.open(tiny_store) as store:
        return read_all(store)


def check(path, folder, plain):
    """Read everything with a stage; returns the bytes that came from the store and from the stage."""
    with Store.open(path, str(folder)) as store:
        assert read_all(store) == plain
        store.flush_stage()
        return store.bytes_read, store.bytes_from_stage


@pytest.fixture
def staged(tiny_store, plain, tmp_path):
    """A stage that holds all units of the store."""
    check(tiny_store, tmp_path / "node", plain)
    return tmp_path / "node"


def only(folder, pattern):
    (found,) = folder.glob(f"*/{pattern}")
    return found


def test_second_job_reads_nothing_from_the_store(tiny_store, plain, tmp_path):
    from_store, from_stage = check(tiny_store, tmp_path / "node", plain)
    assert from_store >= sum(map(len, plain.values())) and from_stage == 0
    from_store, from_stage = check(tiny_store, tmp_path / "node", plain)
    assert from_store == 0 and from_stage >= sum(map(len, plain.values()))
    assert stat.S_IMODE((tmp_path / "node" / Store.open(tiny_store).digest).stat().st_mode) == 0o700


def test_staged_units_need_no_file_of_the_store_but_the_index(store_copy, plain, staged):
    for path in store_copy.glob("*.h5"):
        if path.name != "index.h5":
            path.unlink()
    assert check(store_copy, staged, plain)[0] == 0


def test_what_is_staged_is_known_unit_by_unit(tiny_store, plain, tmp_path):
    with Store.open(tiny_store, str(tmp_path)) as store, Store.open(tiny_store, str(tmp_path)) as other:
        assert not any(store.has_staged(Q, unit) for unit in range(8))
        values = store.read(Q, range(2, 5)).values
        values[:] = 0  # the memory is the caller's again
        store.flush_stage()
        assert [store.has_staged(Q, unit) for unit in range(8)] == [False, False, True, True, True, False, False, False]
        assert other.read(Q).values.tobytes() == plain[Q]  # the other process has taken notice
        size = store.empty(Q, 1).nbytes
        assert other.bytes_from_stage == 3 * size and other.bytes_read == 5 * size
    assert not Store.open(tiny_store).has_staged(Q, 0)


def test_units_from_other_ranks_are_kept_too(tiny_store, plain, tmp_path):
    with Store.open(tiny_store) as store:
        values = store.read(Q).values
        store.keep(Q, 0, values[0])
    with Store.open(tiny_store, str(tmp_path)) as store:
        store.keep(Q, 6, values[6])
        store.flush_stage()
    with Store.open(tiny_store, str(tmp_path)) as store:
        assert [unit for unit in range(8) if store.has_staged(Q, unit)] == [6]
        assert store.read(Q).values.tobytes() == plain[Q]


def test_list_may_end_at_every_byte(tiny_store, plain, staged):
    path = only(staged, "*.list")
    whole, digest = path.read_bytes(), path.parent.name
    store = Store.open(tiny_store)
    sizes = {name: store.empty(name, 1).nbytes for name in store.parameters}
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        assert len(Stage(staged, digest, store.parameters, sizes)._known) == length // 8
        if length % 97 == 0:
            lists = set(path.parent.glob("*.list"))
            check(tiny_store, staged, plain)
            for added in set(path.parent.glob("*.list")) - lists:
                added.unlink()


def test_list_that_grows_while_it_is_read_is_read_on(tiny_store, plain, staged):
    path = only(staged, "*.list")
    whole = path.read_bytes()
    path.write_bytes(whole[:13])
    with Store.open(tiny_store, str(staged)) as store:
        with open(path, "ab") as file:
            file.write(whole[13:])
        assert read_all(store) == plain and store.bytes_read == 0


def test_flipped_bytes_of_the_list_change_nothing_that_is_read(tiny_store, plain, staged):
    path, choose = only(staged, "*.list"), random.Random(0)
    whole = path.read_bytes()
    for _ in range(10):
        data = bytearray(whole)
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        path.write_bytes(data)
        assert check(tiny_store, staged, plain)[0] > 0
        for added in set(path.parent.glob("*.list")) - {path}:
            added.unlink()


def test_damaged_copy_is_read_from_the_store_and_written_again(tiny_store, plain, staged, caplog):
    path, choose = only(staged, "layer-0001.units"), random.Random(1)
    with Store.open(tiny_store, str(staged)) as store:
        row = store._stage._rows[Q]
        size = store.empty(Q, 1).nbytes
    for unit in (0, 7):
        data = bytearray(path.read_bytes())
        data[row.start + unit * row.stride + choose.randrange(size)] ^= 1
        path.write_bytes(data)
    assert check(tiny_store, staged, plain)[0] == 2 * size
    assert [record.levelno for record in caplog.records] == [logging.WARNING] and "damaged" in caplog.text
    assert check(tiny_store, staged, plain)[0] == 0


def test_memory_that_others_use_already_takes_nothing_from_the_stage(tiny_store, staged):
    with Store.open(tiny_store, str(staged)) as store:
        values = store.empty(Q, 2)
        store.read_into([UnitRead(Q, unit, values[unit]) for unit in range(2)], is_shared=True)
        assert store.bytes_from_stage == 0 and store.bytes_read == values.nbytes
        assert values.tobytes() == store.read(Q, range(2)).values.tobytes() and store.bytes_from_stage == values.nbytes


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_copies_that_end_early_or_are_gone_are_written_again(tiny_store, plain, staged, share):
    path = only(staged, "layer-0001.units")
    os.truncate(path, int(path.stat().st_size * share))
    assert check(tiny_store, staged, plain)[0] > 0
    assert check(tiny_store, staged, plain)[0] == 0
    path.unlink()
    assert check(tiny_store, staged, plain)[0] > 0
    assert check(tiny_store, staged, plain)[0] == 0


def test_stage_that_goes_away_during_the_job_is_no_error(tiny_store, plain, staged):
    with Store.open(tiny_store, str(staged)) as store:
        shutil.rmtree(staged)
        assert read_all(store) == plain and store.bytes_read > 0
        store.flush_stage()


def test_copies_of_another_store_are_not_taken(tiny_store, plain, staged):
    (folder,) = staged.iterdir()
    other = "0" * len(folder.name)
    folder.rename(staged / other)
    assert check(tiny_store, staged, plain)[1] == 0
    shutil.rmtree(staged / folder.name)
    (staged / other).rename(staged / folder.name)
    path = only(staged, "layer-0001.units")
    path.write_bytes(path.read_bytes()[::-1])
    from_store, _ = check(tiny_store, staged, plain)
    assert 0 < from_store < sum(map(len, plain.values()))


def test_folder_that_cannot_be_made_is_one_warning(tiny_store, plain, tmp_path, caplog):
    (tmp_path / "file").write_text("x")
    assert check(tiny_store, tmp_path / "file" / "node", plain)[1] == 0
    assert len(caplog.records) == 1 and "Not a directory" in caplog.text


@pytest.mark.parametrize("mode", [0o777, 0o720])
def test_folder_where_others_may_write_is_refused_with_one_warning(tiny_store, plain, staged, mode, caplog):
    (folder,) = staged.iterdir()
    folder.chmod(mode)
    assert check(tiny_store, staged, plain)[1] == 0
    assert len(caplog.records) == 1 and "others may write" in caplog.text


@pytest.mark.parametrize(("mode", "is_refused"), [(0o777, True), (0o770, True), (0o1777, False), (0o755, False)])
def test_place_where_others_may_rename_is_refused_unless_sticky(tiny_store, plain, staged, mode, is_refused, caplog):
    staged.chmod(mode)
    assert (check(tiny_store, staged, plain)[1] == 0) == is_refused
    assert len(caplog.records) == is_refused and ("others may write" in caplog.text) == is_refused


def test_folder_of_somebody_else_is_refused(tiny_store, plain, staged, monkeypatch, caplog):
    monkeypatch.setattr(stage_module.os, "geteuid", lambda: 4711)
    monkeypatch.setattr(stage_module, "_ROOT", 4712)
    assert check(tiny_store, staged, plain)[1] == 0 and len(caplog.records) == 1


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("function", ["open", "pwrite", "fdatasync"])
def test_disk_that_refuses_is_one_warning(tiny_store, plain, tmp_path, monkeypatch, caplog, code, function):
    real, calls = getattr(os, function), []

    def refuse(first, *arguments):
        is_ours = function != "open" or ("node" in str(first) and arguments[0] & os.O_WRONLY)
        calls.extend([1] if is_ours else [])
        if is_ours and len(calls) > 2 * (function == "pwrite"):
            raise OSError(code, os.strerror(code))
        return real(first, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stage_module.os, function, refuse)
        assert check(tiny_store, tmp_path / "node", plain)[0] > 0
    assert calls and len(caplog.records) == 1 and os.strerror(code) in caplog.text
    before = check(tiny_store, tmp_path / "node", plain)
    assert before[0] > 0 and check(tiny_store, tmp_path / "node", plain)[0] == 0


def test_part_of_the_disk_stays_free(tiny_store, plain, tmp_path, monkeypatch, caplog):
    nearly_full = SimpleNamespace(f_bavail=50, f_blocks=1000, f_frsize=4096)
    monkeypatch.setattr(stage_module.os, "fstatvfs", lambda _: nearly_full)
    check(tiny_store, tmp_path, plain)
    assert len(caplog.records) == 1 and "5 % of the disk" in caplog.text
    assert not sum(path.stat().st_size for path in tmp_path.glob("*/*.units"))


def test_what_does_not_fit_into_memory_is_left_for_another_job(tiny_store, plain, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(stage_module, "MAX_PENDING", 1000)
    check(tiny_store, tmp_path, plain)
    monkeypatch.undo()
    from_store, from_stage = check(tiny_store, tmp_path, plain)
    assert from_store > 0 and from_stage > 0 and not caplog.records
    assert check(tiny_store, tmp_path, plain)[0] == 0


READER = """
import sys
from pathlib import Path
from hpcinfer.weights.reader import Store
store = Store.open(Path(sys.argv[1]), sys.argv[2])
names = list(store.parameters)
for name in names[::int(sys.argv[3])]:
    store.read(name)
"""


def start_reader(store, folder, step):
    return subprocess.Popen([sys.executable, "-c", READER, str(store), str(folder), str(step)])


def test_processes_of_a_node_stage_at_once(tiny_store, plain, tmp_path):
    readers = [start_reader(tiny_store, tmp_path, step) for step in (1, -1, 1)]
    assert [reader.wait(timeout=60) for reader in readers] == [0, 0, 0]  # what was read is staged when they have ended
    assert check(tiny_store, tmp_path, plain)[0] == 0


def test_killed_jobs_leave_nothing_that_harms(tiny_store, plain, tmp_path):
    choose = random.Random(2)
    for _ in range(4):
        readers = [start_reader(tiny_store, tmp_path, step) for step in (1, -1)]
        time.sleep(choose.uniform(0.2, 1.5))
        for reader in readers:
            reader.send_signal(signal.SIGKILL)
            reader.wait()
        with Store.open(tiny_store, str(tmp_path)) as store:
            for name in random.Random(3).sample(list(plain), 5):
                assert store.read(name).values.tobytes() == plain[name]
    check(tiny_store, tmp_path, plain)
    assert check(tiny_store, tmp_path, plain)[0] == 0


def test_copies_stand_where_the_index_says_whatever_the_offsets_of_the_store(tiny_store):
    store = Store.open(tiny_store)
    sizes = {name: store.empty(name, 1).nbytes for name in store.parameters}
    rows = stage_module._rows(store.parameters, sizes)
    ranges = sorted(
        (row.file, row.start + unit * row.stride, row.first + unit, sizes[name])
        for name, row in rows.items()
        for unit in range(len(store.parameters[name].checksums))
    )
    for (file, start, _, size), (next_file, next_start, _, _) in zip(ranges, ranges[1:], strict=False):
        assert start % 4096 == 0 and (file != next_file or start + size <= next_start)
    numbers = [number for _, _, number, _ in ranges]
    assert sorted(numbers) == list(range(len(np.unique(numbers))))
