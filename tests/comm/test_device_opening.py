"""Which kind of group GPUs get, and what becomes of it when a rank dies."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import thread_group
from fake_gpu import AwareGroup, FakeGpu, FakeNccl
from jobs import wait_until
from thread_group import run_ranks

from hpcinfer.comm import library
from hpcinfer.comm.device import awareness, opening
from hpcinfer.comm.device.awareness import takes_device_memory
from hpcinfer.comm.device.nccl_group import NcclGroup
from hpcinfer.comm.device.opening import open_device_group
from hpcinfer.comm.device.staged_group import StagedGroup
from hpcinfer.comm.library import claims_device_memory
from hpcinfer.comm.serial import SerialGroup
from hpcinfer.errors import RankFailedError

SEEN_S = 4.0  # a death is seen sooner, on a busy machine too


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(thread_group, "_LIMIT_S", 5)
    monkeypatch.setattr(opening, "takes_device_memory", lambda group, arrays: False)


def opened_by(size, gpu_ids=None, make=FakeNccl):
    """Groups of ranks in threads, with what each binding has made."""

    def work(group):
        gpu = FakeGpu(gpu_ids[group.rank] if gpu_ids else f"GPU {group.rank}")
        binding = make(group)
        opened = open_device_group(group, gpu, lambda: binding)
        room = gpu.empty(2 * size)
        opened.all_gather(gpu.put(np.full(2, group.rank, np.float32)), room, [2] * size)
        assert gpu.get(room).tolist() == [rank for rank in range(size) for _ in range(2)]
        return opened

    results = run_ranks(size, work)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def test_ranks_with_a_gpu_and_a_binding_each_talk_through_nccl(caplog):
    caplog.set_level("INFO")
    groups = opened_by(3)
    assert all(isinstance(group, NcclGroup) and group.is_recordable for group in groups)
    assert [list(group.transports) for group in groups] == [["nccl", "mpi"]] * 3
    assert [record.message for record in caplog.records] == ["3 GPUs talk through NCCL (fake)"]


@pytest.mark.parametrize("gpu_ids, make, reason", [
    (["a", "b", "a"], FakeNccl, "ranks 0 and 2 share a GPU"),
    (None, lambda group: FakeNccl(group) if group.rank != 1 else None, "rank 1 has neither nccl4py nor cupy"),
    (None, lambda group: FakeNccl(group, f"fake {group.rank // 2}"), "different bindings of NCCL: fake 0, fake 1"),
])
def test_all_ranks_take_the_mpi_when_nccl_cannot_have_one_of_them(gpu_ids, make, reason, caplog):
    caplog.set_level("INFO")
    groups = opened_by(3, gpu_ids, make)
    assert all(isinstance(group, StagedGroup) and not group.is_recordable for group in groups)
    [record] = caplog.records
    assert reason in record.message and "3 GPUs talk through the MPI, by way of pinned memory" in record.message


def test_all_ranks_take_the_mpi_when_nccl_fails_on_one_of_them(caplog):
    caplog.set_level("INFO")
    made = {}

    class Failing(FakeNccl):
        def join(self, size, rank, unique_id):
            if rank == 1:
                raise RuntimeError("no network for NCCL")
            made[rank] = super().join(size, rank, unique_id)
            made[rank].is_hanging = True
            return made[rank]

    opening_join_s, opening._JOIN_S = opening._JOIN_S, 0.5
    try:
        groups = opened_by(3, make=Failing)
    finally:
        opening._JOIN_S = opening_join_s
    assert all(isinstance(group, StagedGroup) for group in groups)
    wait_until(lambda: [made[rank].num_aborts for rank in (0, 2)] == [1, 1], timeout=SEEN_S)
    assert any("NCCL fails on rank 0: not ready after 0 s" in record.message for record in caplog.records)


def test_one_rank_needs_nobody():
    opened = open_device_group(SerialGroup(), FakeGpu("a"), lambda: None)
    assert opened.is_recordable and opened.size == 1


# Deaths.


def broken_group(rank=0, size=2):
    """A group of two whose other rank never answers, and dies when the test says so."""
    dead = set()
    group = SimpleNamespace(
        rank=rank, size=size, failed=lambda: frozenset(dead), probe_bytes=lambda tag: None, locations=None
    )
    gpu = FakeGpu("a")
    communicator = FakeNccl(group).join(size, rank, b"the id")
    communicator.is_hanging = True
    return NcclGroup(group, gpu, communicator, StagedGroup(group, gpu)), gpu, communicator, dead


def test_a_death_ends_the_wait_for_a_stream_that_hangs():
    group, gpu, communicator, dead = broken_group()
    group.receive(gpu.empty(10), 1)
    start, looks = time.monotonic(), []

    def check():
        looks.append(1)
        if len(looks) == 20:
            dead.add(1)
        group.check()

    with pytest.raises(RankFailedError, match="has died"):
        gpu.wait(check)
    gpu.wait(lambda: None)  # the stream ends
    assert time.monotonic() - start < SEEN_S and communicator.num_aborts == 1
    for work in (group.check, lambda: group.receive(gpu.empty(10), 1), lambda: group.broadcast(gpu.empty(1))):
        with pytest.raises(RankFailedError, match="aborted"):
            work()
    group.close()
    assert communicator.num_aborts == 1


def test_two_groups_that_hang_on_one_stream_end_together():
    """A communicator gives its memory back when the GPU is at rest, which another one may keep from it."""
    groups = [broken_group() for _ in range(2)]
    gpu = groups[0][1]
    for group, _, communicator, _ in groups:
        group.arrays, abort_one = gpu, communicator.abort
        communicator.abort = lambda abort_one=abort_one: (abort_one(), gpu.wait(lambda: None))
        group.receive(gpu.empty(10), 1)
    for group, *_ in groups:
        group.close()
    gpu.wait(lambda: None)


def test_an_error_of_nccl_ends_the_group():
    group, gpu, communicator, _ = broken_group()
    pending = group.send(gpu.empty(10), 1)
    group.check()
    communicator.error = "remote error"
    with pytest.raises(RankFailedError, match="NCCL: remote error"):
        pending.wait()
    gpu.wait(lambda: None)
    assert communicator.num_aborts == 1


def test_a_call_that_fails_because_of_a_death_says_so_and_any_other_says_what_it_is():
    group, gpu, communicator, dead = broken_group()

    def fail():
        raise RuntimeError("unhandled system error")

    communicator.group_start = fail
    with pytest.raises(RuntimeError, match="unhandled system error"):
        group.send(gpu.empty(10), 1)
    dead.add(1)
    with pytest.raises(RankFailedError):
        group.send(gpu.empty(10), 1)


def test_a_rank_does_not_run_far_ahead_of_its_gpu_so_that_it_can_see_a_death():
    group, gpu, _, dead = broken_group()
    exchange = group.prepare_exchange([(gpu.empty(4), 1)], [], 1)
    looks, check = [], group.check

    def count():
        looks.append(1)
        if len(looks) == 50:
            dead.add(1)
        check()

    group.check = count
    with pytest.raises(RankFailedError):
        for _ in range(1000):
            exchange.start()
    assert gpu.most_ahead < 100


def test_a_death_while_a_communicator_is_made_is_seen():
    dead = set()
    group = SimpleNamespace(
        rank=0, size=2, failed=lambda: frozenset(dead), probe_bytes=lambda tag: None, locations=None,
        all_gather_bytes=lambda data: [data, json.dumps(["b", "slow"]).encode()], broadcast_bytes=lambda data: data,
    )

    class Slow(FakeNccl):
        def join(self, size, rank, unique_id):
            dead.add(1)
            time.sleep(1)

    start = time.monotonic()
    with pytest.raises(RankFailedError):
        open_device_group(group, FakeGpu("a"), lambda: Slow(group, "slow"))
    assert time.monotonic() - start < 0.9


# Whether the MPI takes memory of GPUs.


@pytest.mark.parametrize("claims, lies, answer", [
    ([True] * 3, False, True), ([True, False, True], False, False), ([True] * 3, True, False),
])
def test_what_an_mpi_says_of_itself_is_tried(claims, lies, answer):
    def work(group):
        aware = AwareGroup(group, lies=lies and group.rank == 1)
        return awareness.takes_device_memory(aware, FakeGpu("a"), lambda: claims[group.rank])

    assert run_ranks(3, work) == [answer] * 3


def test_an_mpi_that_cannot_see_the_memory_is_left_alone():
    assert run_ranks(2, lambda group: takes_device_memory(group, FakeGpu("a"), lambda: True)) == [False] * 2


def test_nothing_is_tried_where_nobody_says_so(monkeypatch):
    monkeypatch.delenv("MPICH_GPU_SUPPORT_ENABLED", raising=False)
    assert not claims_device_memory()
    monkeypatch.setenv("MPICH_GPU_SUPPORT_ENABLED", "1")
    assert claims_device_memory()


@pytest.mark.parametrize("functions, answer", [
    ({}, False), ({"MPIX_Query_cuda_support": lambda: 0}, False), ({"MPIX_Query_cuda_support": lambda: 1}, True),
    ({"MPIX_Query_cuda_support": lambda: 0, "MPIX_Query_rocm_support": lambda: 1}, True),
    ({"MPIX_GPU_query_support": lambda kind, found: say(found, kind == 2)}, True),
    ({"MPIX_GPU_query_support": lambda kind, found: say(found, False)}, False),
    ({"MPIX_GPU_query_support": lambda kind, found: 1}, False),
])
def test_each_mpi_is_asked_in_its_own_way(functions, answer, monkeypatch):
    monkeypatch.delenv("MPICH_GPU_SUPPORT_ENABLED", raising=False)
    monkeypatch.setattr(library, "_libraries", lambda: ["libmpi.so"])
    monkeypatch.setattr(library.ctypes, "CDLL", lambda path: SimpleNamespace(**functions))
    assert claims_device_memory() is answer


def say(found, answer):
    """Answer as a function of MPICH does."""
    found._obj.value = int(answer)
    return 0
