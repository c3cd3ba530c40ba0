"""Messages that nobody waits for any more: their buffers live as long as MPI may write to them, and no longer."""

import time

import numpy as np
import pytest

from hpcinfer.comm.world import start_world

pytestmark = pytest.mark.mpi(min_size=2)
TAG = 70


def test_buffers_of_messages_that_were_given_up_are_let_go():
    from hpcinfer.comm.mpi_messages import UNFINISHED

    group = start_world().duplicate()
    before, buffer = len(UNFINISHED), np.zeros(1000, np.uint8)
    after, peer = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    for number in range(5):
        given_up = group.start_receive(buffer, peer, TAG + number)
        given_up.cancel()
        del given_up
    waited_for = group.start_receive(buffer, peer, TAG + 5)
    del waited_for
    group.start_receive(np.zeros(1, np.uint8), group.rank, TAG + 6).cancel()
    assert len(UNFINISHED) <= before + 2, "all but the one that may come, and the last one"
    assert any(held is buffer for _, held in UNFINISHED)
    group.barrier()
    sent = group.send(np.full(1000, group.rank + 1, np.uint8), after, TAG + 5)
    deadline = time.monotonic() + 20
    while any(held is buffer for _, held in UNFINISHED) and time.monotonic() < deadline:
        group.start_receive(np.zeros(1, np.uint8), group.rank, TAG + 6).cancel()
    assert buffer[0] == peer + 1 and not any(held is buffer for _, held in UNFINISHED)
    sent.wait()
