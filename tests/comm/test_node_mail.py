"""Messages through rings in shared memory."""

import random
import time

import numpy as np
import pytest
from node_ranks import on_channel

RING = 1 << 20  # bytes, with few ranks


def message(sender, number, length):
    return np.random.default_rng([sender, number]).bytes(length)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 4096, RING - 16, RING, RING + 1, 3 * RING + 7])
def test_both_may_send_first_whatever_the_length(length):
    def work(channel):
        peer, received = 1 - channel.rank, bytearray(length)
        sent = channel.send(message(channel.rank, 0, length), peer, 3)
        channel.receive(received, peer, 3)
        sent.wait()
        return received == message(peer, 0, length)

    assert on_channel(2, work) == [True, True]


def test_what_fits_into_the_ring_leaves_at_once_and_the_rest_when_there_is_room():
    def work(channel):
        if channel.rank == 0:
            small, large = channel.send(bytes(1000), 1), channel.send(bytes(2 * RING), 1, 1)
            assert small.test() and not large.test()
            channel.barrier()
            large.wait()  # the other reads now
            assert large.test()
        else:
            channel.barrier()
            received = bytearray(b"x" * 1000), bytearray(b"x" * 2 * RING)
            channel.receive(received[0], 0)
            channel.receive(received[1], 0, 1)
            return not any(map(any, received))

    assert on_channel(2, work)[1]


def test_messages_leave_while_their_sender_waits_in_a_collective():
    def work(channel):
        sent = channel.send(bytes(3 * RING), 1) if channel.rank == 0 else None
        if channel.rank == 1:
            channel.receive(bytearray(3 * RING), 0)
        channel.barrier()
        return sent is None or sent.test()

    assert on_channel(2, work) == [True, True]


def test_tags_are_heard_in_any_order_and_one_tag_in_its_own():
    words = [(5, b"a"), (6, b"bb"), (5, b"ccc"), (7, b""), (6, b"dddd")]

    def work(channel):
        if channel.rank == 0:
            for tag, word in words:
                channel.send(word, 1, tag)
            return None
        heard = []
        for tag, length in ((6, 2), (7, 0), (6, 4), (5, 1), (5, 3)):
            buffer = bytearray(length)
            channel.receive(buffer, 0, tag)
            heard.append(bytes(buffer))
        return heard

    assert on_channel(2, work)[1] == [b"bb", b"", b"dddd", b"a", b"ccc"]


def test_receives_that_wait_get_messages_by_tag_and_order():
    def work(channel):
        if channel.rank == 0:
            channel.barrier()
            for number in range(6):
                channel.send(bytes([number]) * 3, 1, number % 2)
            return None
        buffers = [bytearray(3) for _ in range(6)]
        tags = [1, 1, 0, 0, 0, 1]
        pending = [channel.start_receive(buffer, 0, tag) for buffer, tag in zip(buffers, tags, strict=True)]
        assert not any(each.test() for each in pending)
        channel.barrier()
        for each in reversed(pending):
            each.wait()
        return [buffer[0] for buffer in buffers]

    assert on_channel(2, work)[1] == [1, 3, 0, 2, 4, 5]


def test_a_cancelled_receive_writes_nothing_and_spoils_nothing():
    def work(channel):
        if channel.rank == 0:
            large = channel.send(b"y" * 2 * RING, 1, 1)
            channel.barrier()
            large.wait()
            channel.send(b"next", 1, 2).wait()
            return None
        buffer, word = bytearray(2 * RING), bytearray(4)
        never = channel.start_receive(bytearray(9), 0, 8)
        receive = channel.start_receive(buffer, 0, 1)
        while not buffer[0]:
            receive.test()  # it has begun
            time.sleep(0)  # the other rank is a thread
        receive.cancel(), never.cancel()
        done = bytes(buffer)
        channel.barrier()
        channel.receive(word, 0, 2)
        again = bytearray(2 * RING)
        channel.receive(again, 0, 1)  # the message was kept
        return bytes(word), bytes(buffer) == done and 0 in done, again == b"y" * 2 * RING

    assert on_channel(2, work)[1] == (b"next", True, True)


def test_a_cancelled_send_frees_its_buffer_and_arrives_all_the_same():
    def work(channel):
        if channel.rank == 0:
            buffer = bytearray(b"y" * 2 * RING)
            sent = channel.send(buffer, 1)
            sent.cancel()
            buffer[:] = b"n" * 2 * RING
            channel.barrier()
            sent.wait()
            return None
        received = bytearray(2 * RING)
        channel.barrier()
        channel.receive(received, 0)
        return received == b"y" * 2 * RING

    assert on_channel(2, work)[1]


def test_an_empty_message_may_come_before_it_is_asked_for():
    def work(channel):
        if channel.rank == 0:
            channel.send(b"", 1, 5).wait()
            channel.send(b"later", 1, 6).wait()
            return None
        later, nothing = bytearray(5), bytearray()
        channel.receive(later, 0, 6)
        channel.receive(nothing, 0, 5)
        return bytes(later)

    assert on_channel(2, work)[1] == b"later"


@pytest.mark.parametrize("seed", range(3))
def test_many_messages_between_all_ranks_arrive_whole_and_in_order(seed):
    size, rounds = 4, 60
    lengths = [random.Random(seed).choice([0, 8, 5000, 300_000]) for _ in range(rounds)]

    def work(channel):
        delays = random.Random(10 * seed + channel.rank)
        others = [rank for rank in range(size) if rank != channel.rank]
        for number, length in enumerate(lengths):
            if delays.random() < 0.2:
                time.sleep(0.001 * delays.random())
            sent = [channel.send(message(channel.rank, number, length), peer, peer) for peer in others]
            for peer in others:
                received = bytearray(length)
                channel.receive(received, peer, channel.rank)
                assert received == message(peer, number, length), f"{number = } {peer = }"
            for each in sent:
                each.wait()

    on_channel(size, work)
