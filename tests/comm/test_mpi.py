"""One body for each method, over several communicators: the world, its halves, pairs in reverse order, no MPI."""

import time

import numpy as np
import pytest
import torch

from hpcinfer.agree import on_all, on_root, same_everywhere, settle
from hpcinfer.comm.serial import SerialGroup
from hpcinfer.comm.tolerant import TolerantGroup
from hpcinfer.comm.tree import TreeReducer
from hpcinfer.comm.waiting import is_working_meanwhile, turn_meanwhile, work_meanwhile
from hpcinfer.comm.world import start_world
from hpcinfer.errors import ConfigError, HpcInferError, PeerError, StoreError
from hpcinfer.partition.grains import Span, tree_reduce

pytestmark = pytest.mark.mpi(min_size=2)
MIB = 1 << 20
LENGTHS = (0, 1, 5000, 2 * MIB + 3)


@pytest.fixture(scope="module")
def world():
    return start_world()


GROUPS = ["world", "halves", "reversed", "alone", "serial", "tolerant", "tolerant halves"]


@pytest.fixture(scope="module", params=GROUPS)
def group(request, world):
    splits = {"halves": (2 * world.rank // world.size, world.rank), "reversed": (0, -world.rank),
              "alone": (world.rank, 0)}  # fmt: skip
    if request.param == "serial":
        return SerialGroup()
    if request.param.startswith("tolerant"):
        whole = TolerantGroup(world.duplicate(), range(world.size)[::-1], epoch=1)
        return whole if request.param == "tolerant" else whole.split(*splits["halves"])
    return world.split(*splits[request.param]) if request.param in splits else world


def block(rank, length, salt=0):
    """Bytes that say who made them."""
    return np.random.default_rng([rank, length, salt]).bytes(length)


def neighbours(group):
    return (group.rank + 1) % group.size, (group.rank - 1) % group.size


def test_world_has_a_communicator_of_its_own(world):
    from mpi4py import MPI

    assert (world.rank, world.size) == (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size) and world.size > 1
    MPI.COMM_WORLD.Isend([b"x", MPI.BYTE], dest=world.rank, tag=1)
    assert world.probe_bytes(1) is None
    MPI.COMM_WORLD.Recv([bytearray(1), MPI.BYTE], source=world.rank, tag=1)


def test_split_orders_ranks_by_key(world):
    reverse = world.split(7, -world.rank)
    assert (reverse.rank, reverse.size) == (world.size - 1 - world.rank, world.size)
    pairs = world.split(world.rank // 2, world.rank)
    assert (pairs.rank, pairs.size) == (world.rank % 2, 2)


@pytest.mark.parametrize("length", LENGTHS)
def test_broadcast_bytes_gives_the_root_s(group, length):
    for root in range(group.size):
        data = block(root, length) if group.rank == root else None
        assert group.broadcast_bytes(data, root) == block(root, length)


def test_what_others_hold_is_not_broadcast(group):
    assert group.broadcast_bytes(b"root's" if group.rank == 0 else b"longer than the root's") == b"root's"


@pytest.mark.parametrize("length", LENGTHS)
def test_all_gather_bytes_keeps_ranks_and_lengths(group, length):
    lengths = [length if rank % 2 else length // 2 for rank in range(group.size)]
    gathered = group.all_gather_bytes(block(group.rank, lengths[group.rank]))
    assert gathered == [block(rank, lengths[rank]) for rank in range(group.size)]


@pytest.mark.parametrize("unit", [0, 1, 1000, MIB // 4])
def test_all_gather_and_gather_concatenate_uneven_buffers(group, unit):
    counts = [unit * (rank + 1) if rank else unit // 2 for rank in range(group.size)]
    parts = [np.full(count, rank + 0.5, np.float32) for rank, count in enumerate(counts)]
    everywhere = np.empty(sum(counts), np.float32)
    group.all_gather(parts[group.rank], everywhere, counts)
    assert np.array_equal(everywhere, np.concatenate(parts))
    for root in range(group.size):
        on_root_only = np.empty(sum(counts), np.float32) if group.rank == root else None
        group.gather(parts[group.rank], on_root_only, counts, root)
        assert on_root_only is None or np.array_equal(on_root_only, np.concatenate(parts))


def test_gathered_bits_survive_whatever_they_mean(group):
    """Token ids and NaNs travel in float32 buffers."""
    sent = np.array([1, -1, 0x7FA00001, 2**31 - 1], np.int32)
    received = np.zeros(4 * group.size, np.int32)
    group.all_gather(sent.view(np.float32), received.view(np.float32), [4] * group.size)
    assert np.array_equal(received, np.tile(sent, group.size))


def test_tensors_are_filled_in_place(group):
    sent, received = torch.full((2, 3), float(group.rank)), torch.empty(group.size, 2, 3)
    group.all_gather(sent, received, [6] * group.size)
    assert received[:, 0, 0].tolist() == list(range(group.size))
    after, before = neighbours(group)
    pending = group.send(sent, after, 3)
    buffer = torch.empty(2, 3)
    group.receive(buffer, before, 3)
    pending.wait()
    assert torch.equal(buffer, torch.full((2, 3), float(before)))


@pytest.mark.parametrize("length", LENGTHS)
def test_messages_travel_round_the_ring(group, length):
    after, before = neighbours(group)
    pending = group.send_bytes(block(group.rank, length), after, 9)
    assert group.receive_bytes(before, 9) == block(before, length)
    pending.wait()
    sent, received = np.frombuffer(block(group.rank, length, 1), np.uint8), np.empty(length, np.uint8)
    pending = group.send(sent, after, 9)
    group.receive(received, before, 9)
    pending.wait()
    assert received.tobytes() == block(before, length, 1)


def test_messages_of_one_tag_keep_their_order_and_tags_do_not_mix(group):
    after, before = neighbours(group)
    pending = [group.send_bytes(bytes([i]), after, tag) for i, tag in enumerate((1, 2, 1, 2, 1))]
    assert [group.receive_bytes(before, 2) for _ in range(2)] == [b"\1", b"\3"]
    assert [group.receive_bytes(before, 1) for _ in range(3)] == [b"\0", b"\2", b"\4"]
    for each in pending:
        each.wait()
        assert each.test()


def test_probe_takes_from_anyone_and_never_waits(group):
    assert group.probe_bytes(4) is None
    group.barrier()
    pending = [group.send_bytes(block(group.rank, 100), peer, 4) for peer in range(group.size)]
    found = {}
    while len(found) < group.size:
        if (item := group.probe_bytes(4)) is not None:
            found[item[0]] = item[1]
    assert found == {rank: block(rank, 100) for rank in range(group.size)} and group.probe_bytes(4) is None
    for each in pending:
        each.wait()


def test_tree_sum_equals_that_of_one_rank(group):
    values = np.random.default_rng(1).standard_normal((16, 4, 33)) * 10.0 ** np.arange(-8, 8)[:, None, None]
    values = values.astype(np.float32)
    leaves = {Span(g, g + 1): torch.from_numpy(values[g]) for g in range(16)}
    reducer = TreeReducer(group, 16, torch.empty)
    first = reducer.run.start
    nodes = [tree_reduce(leaves, Span(first + a, first + b), torch.add) for a, b in reducer.spans]
    expected = tree_reduce(leaves, Span(0, 16), torch.add)
    assert reducer.reduce(nodes).numpy().tobytes() == expected.numpy().tobytes()
    first, second = reducer.start(nodes), reducer.start(nodes)
    assert [reducer.finish(each).numpy().tobytes() for each in (first, second)] == [expected.numpy().tobytes()] * 2


# How ranks fail together.


def outcome(work):
    try:
        return work()
    except Exception as error:
        return error


@pytest.mark.parametrize("error", [StoreError("flipped", where="a file"), ConfigError("wrong"), OSError("disk full")])
def test_error_on_one_rank_ends_all_with_one_message_and_one_code(group, error):
    failing = group.size - 1
    caught = outcome(lambda: settle(group, error if group.rank == failing else None))
    if group.rank == failing:
        assert caught is error
    else:
        assert type(caught) is PeerError and caught.exit_code == getattr(error, "exit_code", 1)
        assert str(error) in caught.found and caught.where == f"rank {failing}/{group.size}"
    settle(group, None)  # nobody is left in a collective


def test_of_several_errors_the_lowest_rank_s_is_said(group):
    caught = outcome(lambda: settle(group, HpcInferError(f"from {group.rank}")))
    assert type(caught) is (HpcInferError if group.rank == 0 else PeerError) and "from 0" in str(caught)


def test_message_that_is_no_utf8_leaves_nobody_waiting(group):
    caught = outcome(lambda: settle(group, StoreError("file \udcff") if group.rank == 0 else None))
    assert type(caught) is (StoreError if group.rank == 0 else PeerError)


def test_work_on_all_ranks_fails_on_all_or_none(group):
    assert on_all(group, lambda: group.rank) == group.rank

    def work():
        if group.rank == group.size - 1:
            raise KeyError("gone")

    caught = outcome(lambda: on_all(group, work))
    assert type(caught) is (KeyError if group.rank == group.size - 1 else PeerError)
    assert getattr(caught, "exit_code", 1) == 1


def test_root_works_for_all(group):
    calls = []

    def work():
        calls.append(1)
        return block(0, MIB)

    assert on_root(group, work) == block(0, MIB) and len(calls) == (group.rank == 0)
    caught = outcome(lambda: on_root(group, lambda: bytes(1 // 0)))
    assert type(caught) is (ZeroDivisionError if group.rank == 0 else PeerError)


def test_ranks_that_differ_from_the_root_are_named(group):
    same_everywhere(group, {"x": "equal"}, "profiles")
    value = "avx2" if group.rank == group.size - 1 and group.size > 1 else "avx512"
    caught = outcome(lambda: same_everywhere(group, {"x": value}, "profiles"))
    if group.size == 1:
        assert caught is None
    elif group.rank == group.size - 1:
        assert type(caught) is ConfigError and "x is 'avx2'" in str(caught) and "avx512" in str(caught)
    else:
        assert type(caught) is PeerError and caught.exit_code == 2


WAITS = pytest.mark.parametrize("wait", [
    lambda group: group.barrier(),
    lambda group: group.broadcast_bytes(b"x" if group.rank == group.size - 1 else None, group.size - 1),
    lambda group: group.all_gather_bytes(b"x"),
    lambda group: group.all_gather(np.zeros(2, "f4"), np.zeros(2 * group.size, "f4"), [2] * group.size),
    lambda group: group.gather(np.zeros(2, "f4"), np.zeros(2 * group.size, "f4"), [2] * group.size),
    lambda group: group.split(0, group.rank),
    lambda group: group.receive(np.empty(1), group.size - 1, 3) if group.rank != group.size - 1
    else group.wait_all([group.send(np.ones(1), rank, 3) for rank in range(group.size - 1)]),
], ids=["barrier", "broadcast", "all_gather_bytes", "all_gather", "gather", "split", "receive"])


@pytest.fixture(params=["plain", "tolerant"])
def whole(request, world):
    """All ranks."""
    return world if request.param == "plain" else TolerantGroup(world.duplicate(), range(world.size), epoch=1)


@WAITS
def test_other_messages_go_on_while_one_thread_waits(whole, wait):
    last = whole.size - 1
    if whole.rank == last:
        for rank in range(last):
            assert whole.receive_bytes(rank, 5) == b"%d" % rank
    else:
        looks = iter(range(100))

        def turn():
            if next(looks) < 50:
                return True
            whole.send_bytes(b"%d" % whole.rank, last, 5)
            return False

        work_meanwhile(turn)
    wait(whole)  # the last one comes when it has heard from all others, who wait for it
    while is_working_meanwhile():
        turn_meanwhile()
    whole.barrier()


@WAITS
def test_who_waits_holds_no_core(whole, wait):
    last = whole.size - 1
    whole.barrier()
    before = time.thread_time()
    if whole.rank == last:
        time.sleep(0.4)
    wait(whole)
    if whole.rank == 0:
        assert time.thread_time() - before < 0.2
    whole.barrier()
