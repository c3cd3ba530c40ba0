"""Files of shared memory: their name does not stay, whoever dies, and a full file system is no signal."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from node_ranks import on_channel
from thread_group import run_ranks

from hpcinfer.comm.node import channel, region
from hpcinfer.comm.node import library as library_module
from hpcinfer.comm.node.channel import NodeChannel
from hpcinfer.comm.node.library import load
from hpcinfer.comm.node.region import FOLDER, Geometry, create_file, map_file, open_region, remove_leftovers
from hpcinfer.comm.serial import SerialGroup
from hpcinfer.errors import RankFailedError

SMALL = Geometry(2, 4096, 0, 4096)


@pytest.fixture
def library():
    found = load()
    if found is None:
        pytest.skip("the node library was not built")
    return found


@pytest.fixture
def name():
    """The path of a region."""
    path = Path(create_file(FOLDER, SMALL))
    yield path
    path.unlink(missing_ok=True)


def ours():
    return {entry for entry in os.listdir(FOLDER) if entry.startswith(f"hpcinfer-{region._namespace()}-{os.getpid()}-")}


def test_no_name_is_left_when_all_have_the_memory():
    assert on_channel(3, lambda channel: (channel.barrier(), ours())[1]) == [set()] * 3


def test_only_its_user_may_open_a_region(name):
    assert name.stat().st_mode & 0o777 == 0o600


def test_who_has_mapped_a_region_keeps_it_without_its_name(library, name):
    first, second = (map_file(library, str(name), SMALL, rank) for rank in range(2))
    name.unlink()
    first[5000:5003] = b"abc"
    assert second[5000:5003] == b"abc" and len(first) == SMALL.total_bytes


def test_pages_are_there_before_anybody_writes(library, name):
    assert name.stat().st_blocks == 0
    map_file(library, str(name), SMALL, 1)
    assert name.stat().st_blocks * 512 == SMALL.part_bytes


def test_too_little_room_is_known_before_anything_is_made(name):
    free = os.statvfs(FOLDER)
    before = ours()
    with pytest.raises(OSError, match="bytes are free"):
        create_file(FOLDER, Geometry(2, free.f_bavail * free.f_frsize, 0, 0))
    assert ours() == before


def test_pages_that_another_job_takes_first_make_the_region_smaller_on_all_ranks(library, monkeypatch, caplog):
    """There was room when the file was made; when the pages are asked for there is not."""
    reserve = os.posix_fallocate

    def reserve_little(file, start, num_bytes):
        if start > 0 and num_bytes > 1 << 21:
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(file, start, num_bytes)

    monkeypatch.setattr(os, "posix_fallocate", reserve_little)

    def work(group):
        found = NodeChannel.open(group, range(2), 1 << 20)
        return found._geometry.slot_bytes, found.all_gather_bytes(b"%d" % group.rank)

    assert run_ranks(2, work) == [(1 << 16, [b"0", b"1"])] * 2
    assert not ours() and not caplog.records
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: reserve_little(0, 1, 1 << 30))
    assert run_ranks(2, lambda group: NodeChannel.open(group, range(2))) == [None, None]
    assert "talk through the MPI, without shared memory" in caplog.text and "No space left" in caplog.text
    assert not ours()


@pytest.fixture
def small_folder(tmp_path):
    """A file system in memory of 6 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield str(folder)
    subprocess.run(["umount", "-l", folder], check=True)


def test_two_groups_share_a_small_file_system_without_a_signal(library, small_folder):
    """Either would fit alone, both find room for their files, and not for their pages."""

    def work(group):
        members = [0, 1] if group.rank < 2 else [2, 3]
        found = NodeChannel.open(group, members, folder=small_folder)
        gathered = np.empty(2 << 18, np.float32)
        found.all_gather(np.full(1 << 18, group.rank, np.float32), gathered, [1 << 18] * 2)
        return found._geometry.slot_bytes, set(gathered)

    assert run_ranks(4, work) == [(1 << 16, {0, 1})] * 2 + [(1 << 16, {2, 3})] * 2
    assert not os.listdir(small_folder)


@pytest.mark.parametrize(
    "free_mib, room_bytes, slot_bytes", [(100, 1 << 20, 1 << 20), (9, 0, 1 << 20), (1, 0, 1 << 16)]
)
def test_where_memory_is_short_there_are_no_rooms_and_small_slots(
    library, monkeypatch, free_mib, room_bytes, slot_bytes
):
    real = os.statvfs(FOLDER)
    short = os.statvfs_result([real.f_bsize, 1 << 20, real.f_blocks, 0, free_mib, *real[5:10]])
    monkeypatch.setattr(os, "statvfs", lambda folder: short)

    def work(group):
        found = NodeChannel.open(group, range(2), 1 << 20)
        return found.room_bytes, found._geometry.slot_bytes, found.all_gather_bytes(b"%d" % group.rank)

    assert run_ranks(2, work) == [(room_bytes, slot_bytes, [b"0", b"1"])] * 2


def test_one_rank_that_cannot_leaves_all_without_a_channel(library, monkeypatch):
    def fails_on_rank_1(library, path, geometry, rank):
        if rank == 1:
            raise OSError("not here")
        return map_file(library, path, geometry, rank)

    monkeypatch.setattr(region, "map_file", fails_on_rank_1)
    assert run_ranks(3, lambda group: NodeChannel.open(group, range(3))) == [None] * 3
    assert not ours()


def test_nodes_of_a_group_have_channels_of_their_own(library):
    def work(group):
        members = [0, 3] if group.rank in (0, 3) else [1, 2]
        found = NodeChannel.open(group, members)
        return found.rank, found.all_gather_bytes(b"%d" % group.rank)

    assert run_ranks(4, work) == [(0, [b"0", b"3"]), (0, [b"1", b"2"]), (1, [b"1", b"2"]), (1, [b"0", b"3"])]


def test_a_file_that_is_not_in_memory_is_refused(library, tmp_path):
    path = create_file(str(tmp_path), SMALL)
    if subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True).stdout == "tmpfs\n":
        pytest.skip("temporary files are in memory here")
    with pytest.raises(OSError, match="not in memory"):
        map_file(library, path, SMALL, 0)


def test_nothing_is_opened_where_there_is_no_such_folder(library):
    assert NodeChannel.open(SerialGroup(), [0], folder="/nonexistent") is None


def test_without_the_library_there_is_no_channel(monkeypatch):
    monkeypatch.setattr(channel, "load", lambda: None)
    assert run_ranks(2, lambda group: NodeChannel.open(group, range(2))) == [None, None]


def test_a_library_of_another_version_is_refused_with_a_word(monkeypatch, caplog):
    for stale in (SimpleNamespace(HPC_LAYOUT=library_module.LAYOUT + 1), SimpleNamespace()):
        module = SimpleNamespace(ffi=None, lib=stale, __file__="_node.so")
        monkeypatch.setattr(library_module.importlib, "import_module", lambda *_, module=module: module)
        assert load.__wrapped__() is None
    assert caplog.text.count("_node.so is of another version") == 2 and "install hpcinfer again" in caplog.text


def test_only_what_dead_ranks_of_this_user_have_left_is_removed(tmp_path):
    code = "from hpcinfer.comm.node.region import FOLDER, Geometry, create_file; import sys; "
    code += "print(create_file(sys.argv[1], Geometry(1, 64, 0, 64)))"
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    dead = Path(run.stdout.strip())
    alive = Path(create_file(str(tmp_path), SMALL))  # has removed the other
    assert not dead.exists()
    later = tmp_path / alive.name.replace(f"-{os.getpid()}-", f"-{os.getpid()}-1")  # the number was given again
    elsewhere = tmp_path / f"hpcinfer-1{dead.name.split('-', 1)[1]}"  # of another PID namespace
    strange = tmp_path / "hpcinfer-notes"
    for path in (later, elsewhere, strange):
        path.touch()
    remove_leftovers(str(tmp_path))
    assert set(tmp_path.iterdir()) == {alive, elsewhere, strange}


def test_a_rank_that_cannot_be_looked_at_is_not_taken_for_dead(tmp_path, monkeypatch):
    path, read = Path(create_file(str(tmp_path), SMALL)), Path.read_bytes
    for error, is_there in ((PermissionError, True), (OSError, True), (ProcessLookupError, False)):

        def fail(self, error=error):
            if self.name == "stat":
                raise error
            return read(self)

        monkeypatch.setattr(Path, "read_bytes", fail)
        remove_leftovers(str(tmp_path))
        assert path.exists() == is_there


def test_any_member_removes_the_name_when_the_one_that_made_it_has_died(library, name):
    def all_gather_bytes(data):
        if data:
            raise RankFailedError("rank 0 has died")
        return [str(name).encode(), b""]

    with pytest.raises(RankFailedError):
        open_region(SimpleNamespace(rank=1, all_gather_bytes=all_gather_bytes), [0, 1], [SMALL], FOLDER, library)
    assert not name.exists()


def test_too_little_memory_for_a_channel_is_an_error_and_no_crash(library, name):
    def new(*_):
        return library.ffi.NULL

    poor = library_module.Library(library.ffi, SimpleNamespace(hpc_channel_new=new))
    with pytest.raises(MemoryError):
        NodeChannel(poor, (map_file(library, str(name), SMALL, 0), SMALL), 0, (0, 0), lambda: None)
