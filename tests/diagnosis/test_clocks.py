import time

from thread_group import run_ranks

from hpcinfer.diagnosis import clocks
from hpcinfer.diagnosis.clocks import measure_clocks


def test_clocks_are_compared_with_the_roots_for_one_rank_of_each_node(monkeypatch):
    real = time.time
    monkeypatch.setattr(clocks, "_answer", _answer_that_is_late(real))
    results = run_ranks(4, lambda world: measure_clocks(world, [0, 1, 3]))
    assert sorted(results[0]) == [1, 3] and results[1:] == [{}, {}, {}]
    assert abs(results[0][1]) < 0.5 and abs(results[0][3] + 60) < 0.5


def _answer_that_is_late(real):
    def answer(world):
        import numpy as np

        note = np.zeros(1)
        for _ in range(clocks._PINGS):
            world.receive(note, 0, clocks._TAG)
            note[0] = real() - 60 * (world.rank == 3)
            world.send(note, 0, clocks._TAG).wait()

    return answer
