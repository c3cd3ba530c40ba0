"""Files of shared memory: their name does not stay, whoever dies, and a full file system is no signal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from node_ranks import on_channel
from thread_group import run_ranks

from hpcinfer.comm.node import channel, region
from hpcinfer.comm.node.channel import FOLDER, NodeChannel
from hpcinfer.comm.node.library import load
from hpcinfer.comm.node.region import Geometry, create_file, map_file, remove_file, remove_leftovers
from hpcinfer.comm.serial import SerialGroup

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
    created = create_file(FOLDER, [SMALL])
    assert created is not None and created.geometry == SMALL
    yield Path(created.path)
    remove_file(created)


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


def test_too_little_room_is_an_answer(library, name, monkeypatch):
    free = os.statvfs(FOLDER)
    assert create_file(FOLDER, [Geometry(2, free.f_bavail * free.f_frsize, 0, 0)]) is None
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert map_file(library, str(name), SMALL, 0) is None


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
        return None if rank == 1 else map_file(library, path, geometry, rank)

    monkeypatch.setattr(channel, "map_file", fails_on_rank_1)
    assert run_ranks(3, lambda group: NodeChannel.open(group, range(3))) == [None] * 3
    assert not ours()


def test_nodes_of_a_group_have_channels_of_their_own(library):
    def work(group):
        members = [0, 3] if group.rank in (0, 3) else [1, 2]
        found = NodeChannel.open(group, members)
        return found.rank, found.all_gather_bytes(b"%d" % group.rank)

    assert run_ranks(4, work) == [(0, [b"0", b"3"]), (0, [b"1", b"2"]), (1, [b"1", b"2"]), (1, [b"0", b"3"])]


def test_a_file_that_is_not_in_memory_is_refused(library, tmp_path):
    path = create_file(str(tmp_path), [SMALL]).path
    if subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True).stdout == "tmpfs\n":
        pytest.skip("temporary files are in memory here")
    assert map_file(library, path, SMALL, 0) is None


def test_nothing_is_opened_where_there_is_no_such_folder(library):
    assert NodeChannel.open(SerialGroup(), [0], folder="/nonexistent") is None


def test_without_the_library_there_is_no_channel(monkeypatch):
    monkeypatch.setattr(channel, "load", lambda: None)
    assert run_ranks(2, lambda group: NodeChannel.open(group, range(2))) == [None, None]


def test_only_what_dead_ranks_of_this_user_have_left_is_removed(tmp_path):
    code = "from hpcinfer.comm.node.region import Geometry, create_file; import sys; "
    code += "print(create_file(sys.argv[1], [Geometry(1, 64, 0, 64)]).path)"
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    dead = Path(run.stdout.strip())
    alive = Path(create_file(str(tmp_path), [SMALL]).path)  # has removed the other
    assert not dead.exists()
    later = tmp_path / alive.name.replace(f"-{os.getpid()}-", f"-{os.getpid()}-1")  # the number was given again
    elsewhere = tmp_path / f"hpcinfer-1{dead.name.split('-', 1)[1]}"  # of another PID namespace
    strange = tmp_path / "hpcinfer-notes"
    for path in (later, elsewhere, strange):
        path.touch()
    remove_leftovers(str(tmp_path))
    assert set(tmp_path.iterdir()) == {alive, elsewhere, strange}
