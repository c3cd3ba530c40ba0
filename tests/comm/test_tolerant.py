"""Groups that can lose members, over a line in memory; over MPI: test_mpi.py, with real deaths: test_regroup.py."""

import threading
import time
from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.comm.tolerant import TolerantGroup
from hpcinfer.errors import RankFailedError

LIMIT_S = 20


class Wire:
    """The messages of all ranks, and who is dead."""

    def __init__(self, size):
        self.size, self.dead, self.mail, self.lock = size, frozenset(), {}, threading.Lock()

    def lines(self):
        return [Line(self, rank) for rank in range(self.size)]


class Receive:
    """A message that is to come into a buffer."""

    def __init__(self, line, buffer, key):
        self._line, self._buffer, self._key, self.is_done, self.is_cancelled = line, buffer, key, False, False

    def test(self):
        data = None if self.is_done else self._line.take(self._key)
        if data is not None:
            flat = np.asarray(self._buffer).reshape(-1)
            flat[:] = np.frombuffer(data, flat.dtype)
            self.is_done = True
        return self.is_done

    def cancel(self):
        self.is_cancelled = True


class Sent:
    def test(self):
        return True

    def wait(self):
        pass


class Line:
    """One rank of it."""

    def __init__(self, wire, rank):
        self.wire, self.rank, self.size, self.receives = wire, rank, wire.size, []
        self.end = time.monotonic() + LIMIT_S

    def failed(self):
        return self.wire.dead

    def send(self, buffer, peer, tag=0):
        return self.send_bytes(np.ascontiguousarray(buffer).tobytes(), peer, tag)

    def send_bytes(self, data, peer, tag=0):
        with self.wire.lock:
            self.wire.mail.setdefault((self.rank, peer, tag), deque()).append(bytes(data))
        return Sent()

    def take(self, key):
        with self.wire.lock:
            queue = self.wire.mail.get(key)
            return queue.popleft() if queue else None

    def start_receive(self, buffer, peer, tag=0):
        self.receives.append(Receive(self, buffer, (peer, self.rank, tag)))
        return self.receives[-1]

    def probe_bytes_of(self, peer, tag):
        return self.take((peer, self.rank, tag))

    def probe_bytes(self, tag):
        found = ((peer, self.take((peer, self.rank, tag))) for peer in range(self.size))
        return next((item for item in found if item[1] is not None), None)

    def pause(self):
        def pause():
            assert time.monotonic() < self.end, f"rank {self.rank} waits for ever"
            time.sleep(0.0002)

        return pause


def on_all(wire, work):
    """Call `work(line)` in a thread for each living rank; gives what it returned or raised, by rank."""
    results = {}

    def main(line):
        try:
            results[line.rank] = work(line)
        except Exception as error:
            results[line.rank] = error

    threads = [threading.Thread(target=main, args=(line,)) for line in wire.lines() if line.rank not in wire.dead]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("members", [(0, 1, 2), (4, 2, 0), (3,)])
def test_members_are_numbered_as_they_are_given_and_collectives_go_by_that(members):
    wire = Wire(5)

    def work(line):
        if line.rank not in members:
            return None
        group = TolerantGroup(line, members, 1)
        counts = [2 * rank + 1 for rank in range(group.size)]
        everywhere, at_root = np.zeros(sum(counts), np.float32), np.zeros(sum(counts), np.float32)
        own = np.full(counts[group.rank], group.rank, np.float32)
        group.all_gather(own, everywhere, counts)
        group.gather(own, at_root if group.rank == 0 else None, counts)
        group.barrier()
        words = group.all_gather_bytes(b"%d" % line.rank)
        return group.rank, everywhere.tolist(), at_root.tolist(), words, group.broadcast_bytes(
            b"from root" if group.rank == 0 else None)

    results = on_all(wire, work)
    expected = np.repeat(np.arange(len(members)), [2 * rank + 1 for rank in range(len(members))]).tolist()
    for place, member in enumerate(members):
        rank, everywhere, at_root, words, said = results[member]
        assert (rank, everywhere, said) == (place, expected, b"from root")
        assert words == [b"%d" % each for each in members]
        assert at_root == (expected if place == 0 else [0] * len(expected))
    assert not any(wire.mail.values())


@pytest.mark.parametrize("wait", ["receive", "receive_bytes", "barrier", "all_gather"])
def test_a_death_ends_the_waiting_of_all_even_of_those_who_wait_for_the_living(wait):
    wire = Wire(4)

    def work(line):
        group = TolerantGroup(line, (0, 1, 2, 3), 1)
        if group.rank == 3:
            wire.dead = frozenset({3})
            return None
        buffer = np.zeros(4, np.float32)
        match wait:
            case "receive":
                group.receive(buffer, 0 if group.rank else 1)
            case "receive_bytes":
                group.receive_bytes(0 if group.rank else 1)
            case "barrier":
                group.barrier()
            case "all_gather":
                group.all_gather(np.ones(1, np.float32), buffer, [1] * 4)

    results = on_all(wire, work)
    for rank in range(3):
        assert type(results[rank]) is RankFailedError and "rank 3 of the world" in results[rank].found


def test_after_a_death_nothing_is_written_into_the_buffers_of_those_that_waited():
    wire = Wire(3)
    line = wire.lines()[0]
    group = TolerantGroup(line, (0, 1, 2), 1)
    wire.dead = frozenset({2})
    with pytest.raises(RankFailedError):
        group.all_gather(np.ones(1, np.float32), np.zeros(3, np.float32), [1] * 3)
    assert len(line.receives) == 2 and all(receive.is_cancelled for receive in line.receives)


def test_what_has_come_is_taken_though_its_sender_has_died_since():
    wire = Wire(2)
    first, second = (TolerantGroup(line, (0, 1), 1) for line in wire.lines())
    second.send_bytes(b"last words", 0, 5)
    wire.dead = frozenset({1})
    assert first.receive_bytes(1, 5) == b"last words"
    with pytest.raises(RankFailedError):
        first.receive_bytes(1, 5)


def test_the_dead_are_told_by_their_place_in_the_group_and_strangers_are_none_of_its_business():
    wire = Wire(6)
    group = TolerantGroup(wire.lines()[2], (5, 2, 4), 1)
    wire.dead = frozenset({0, 1})
    group.check()
    assert group.failed() == frozenset()
    wire.dead = frozenset({0, 4, 5})
    assert group.failed() == {0, 2}
    with pytest.raises(RankFailedError, match="rank 4, 5 of the world"):
        group.check()


@given(epochs=st.lists(st.integers(1, 2**20 - 1), min_size=2, max_size=2, unique=True), tag=st.integers(0, 61))
def test_late_messages_of_a_dead_group_find_nobody(epochs, tag):
    wire = Wire(2)
    old, new = (TolerantGroup(wire.lines()[0], (0, 1), epoch) for epoch in epochs)
    sender = TolerantGroup(wire.lines()[1], (0, 1), epochs[0])
    sender.send_bytes(b"late", 0, tag)
    assert new.probe_bytes(tag) is None
    assert old.probe_bytes(tag) == (1, b"late")


def test_parts_of_a_group_do_not_hear_each_other_and_watch_all_of_it():
    wire = Wire(4)

    def work(line):
        group = TolerantGroup(line, (3, 1, 2, 0), 7)
        half = group.split(group.rank // 2, -group.rank)
        quarter = half.split(half.rank, 0)
        again = group.split(0, group.rank)
        for part, word in ((group, b"all"), (half, b"half"), (again, b"again")):
            part.send_bytes(word, (part.rank + 1) % part.size, 5)
        heard = [part.receive_bytes((part.rank - 1) % part.size, 5) for part in (again, half, group)]
        return half.members, quarter.members, again.members, heard, half

    results = on_all(wire, work)
    assert [results[rank][0] for rank in range(4)] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert [results[rank][1] for rank in range(4)] == [(0,), (1,), (2,), (3,)]
    assert all(results[rank][2:4] == ((3, 1, 2, 0), [b"again", b"half", b"all"]) for rank in range(4))
    wire.dead = frozenset({1})
    with pytest.raises(RankFailedError):
        results[0][4].check()  # of ranks 0 and 2: what they wait for may wait for rank 1


def test_a_message_is_told_from_its_sender_in_the_group():
    wire = Wire(3)
    lines = wire.lines()
    receiver, sender = (TolerantGroup(line, (2, 1, 0), 1) for line in (lines[0], lines[1]))
    sender.send_bytes(b"word", 2, 9)
    assert receiver.probe_bytes(9) == (1, b"word") and receiver.probe_bytes(9) is None
