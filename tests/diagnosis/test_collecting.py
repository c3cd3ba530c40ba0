import time

import pytest

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.diagnosis.collecting import collect, missing


def test_one_rank_answers_itself():
    assert collect(SerialGroup(), b"own", 1.0) == {0: b"own"}


@pytest.mark.mpi(min_size=2)
def test_the_root_gets_what_all_ranks_send():
    from hpcinfer.comm.mpi import world_group

    world = world_group()
    answers = collect(world, b"%d" % world.rank * 3000, 20.0)
    expected = {rank: b"%d" % rank * 3000 for rank in range(world.size)} if world.rank == 0 else {}
    assert answers == expected


@pytest.mark.mpi(min_size=2)
def test_the_root_does_not_wait_longer_than_it_should_for_a_silent_rank():
    from hpcinfer.comm.mpi import world_group

    world, start = world_group(), time.monotonic()
    if world.rank == 0:
        answers = collect(world, b"x", 0.5)
        assert missing(answers, world.size) == (1,) and 0.4 < time.monotonic() - start < 5
    elif world.rank > 1:
        collect(world, b"x", 0.5)
    world.barrier()


def test_missing_ranks_are_counted():
    assert missing({0: b"", 2: b""}, 4) == (1, 3) and missing({0: b""}, 1) == ()
