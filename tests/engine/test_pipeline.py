"""Messages of a replica between threads: which way they take, and what is known to be under way."""

import numpy as np
import pytest
from thread_group import run_ranks

from hpcinfer.comm.node.library import load
from hpcinfer.comm.node.opening import open_channel
from hpcinfer.comm.operations import Operations
from hpcinfer.engine.pipeline import Pipeline, Place
from hpcinfer.partition.topology import Location

WIDTH, MAX_TOKENS = 8, 100


class Leaving:
    """A message that leaves when it is let go."""

    has_left = False

    def test(self):
        return self.has_left

    def wait(self):
        assert self.has_left


def stage_of(group, allocated):
    def allocate(num_tokens):
        allocated.append(num_tokens)
        return np.zeros((num_tokens, WIDTH), "f4")

    return Pipeline(Operations(group, open_channel(group)), Place(2, 1, group.rank, 0), MAX_TOKENS, allocate)


@pytest.mark.parametrize("nodes, rooms", [((0, 0), [3, 5]), ((0, 1), [MAX_TOKENS] * 3)])
def test_hidden_states_come_into_one_room_each(nodes, rooms):
    """From another node, the room of the next micro-batch waits already."""
    if load() is None:
        pytest.skip("the node library was not built")

    def work(group):
        group.locations, allocated = tuple(Location((), node, 0) for node in nodes), []
        pipeline = stage_of(group, allocated)
        allocated.clear()  # what it takes to find the size of a token
        for num_tokens in (3, 5):
            if group.rank == 0:
                pipeline.send_hidden(np.full((num_tokens, WIDTH), num_tokens, "f4"))
            else:
                hidden = pipeline.receive_hidden(num_tokens)
                assert hidden.shape == (num_tokens, WIDTH) and (hidden == num_tokens).all()
        is_busy = pipeline.is_busy()
        pipeline.flush()
        return allocated, is_busy, pipeline.is_busy()

    assert run_ranks(2, work) == [([], False, False), (rooms, nodes == (0, 1), False)]


def test_a_stage_is_busy_until_what_it_has_sent_has_left():
    def work(group):
        message = Leaving()
        group.send = lambda buffer, peer, tag=0: message
        pipeline = stage_of(group, [])
        assert not pipeline.is_busy()
        pipeline.send_hidden(np.zeros((1, WIDTH), "f4"))
        assert pipeline.is_busy() and pipeline.is_busy()
        message.has_left = True
        return pipeline.is_busy()

    assert run_ranks(1, work) == [False]
