from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.recovery.dealing import Answer, Deal, Dealer

ROWS = st.lists(st.integers(0, 2**40), max_size=9).map(tuple)
DEALS = st.lists(st.builds(Deal, st.integers(0, 2**40), st.integers(1, 2**30), ROWS), max_size=5).map(tuple)


class Claims:
    """Blocks of three rows."""

    def __init__(self, blocks):
        self._blocks, self.is_complete = list(range(blocks)), False

    def take(self):
        if not self._blocks:
            return None
        block = self._blocks.pop(0)
        return SimpleNamespace(block=block, generation=1, rows=np.arange(3 * block, 3 * block + 3))

    @property
    def num_undealt(self):
        return 3 * len(self._blocks)


class World:
    """Messages in memory."""

    def __init__(self):
        self.wants, self.sent = [], []

    def probe_bytes(self, tag):
        return self.wants.pop(0) if self.wants else None

    def send_bytes(self, data, leader, tag):
        self.sent.append((leader, Answer.from_bytes(data)))
        return SimpleNamespace(test=lambda: True, wait=lambda: None)


def deal(claims, wants, num_leaders):
    world = World()
    world.wants = [(leader, rows.to_bytes(8, "little")) for leader, rows in wants]
    Dealer(world, claims, num_leaders).serve()
    return [(leader, answer.is_end, sum(len(each.rows) for each in answer.deals)) for leader, answer in world.sent]


@given(is_end=st.booleans(), deals=DEALS)
def test_answers_survive_encoding(is_end, deals):
    assert Answer.from_bytes(Answer(is_end, deals).to_bytes()) == Answer(is_end, deals)


def test_a_leader_gets_the_rows_that_it_lacks_at_once():
    assert deal(Claims(400), [(0, 10)], 2) == [(0, False, 12)]


def test_few_rows_are_shared_evenly():
    assert deal(Claims(8), [(0, 100), (1, 100)], 2) == [(0, False, 12), (1, False, 12)]


def test_nobody_comes_twice_before_all_came_once():
    assert deal(Claims(8), [(0, 100), (0, 100)], 2) == [(0, False, 12)]
    assert deal(Claims(40), [(0, 6), (0, 100), (1, 3), (1, 30)], 2) == [(0, False, 6), (1, False, 3), (1, False, 30)]


def test_small_jobs_are_dealt_like_cards():
    world = World()
    world.wants = [(leader, (100).to_bytes(8, "little")) for leader in (2, 0, 1)]
    Dealer(world, Claims(7), 3).serve()
    found = [(leader, [each.block for each in answer.deals]) for leader, answer in world.sent]
    assert found == [(2, [0, 3, 6]), (0, [1, 4]), (1, [2, 5])]


def test_those_who_had_their_share_hear_of_the_end_though_others_got_nothing():
    world, claims = World(), Claims(1)
    dealer = Dealer(world, claims, 2)
    world.wants = [(leader, (9).to_bytes(8, "little")) for leader in (0, 1, 0)]
    dealer.serve()
    claims.is_complete = True
    dealer.serve()
    assert [(leader, answer.is_end) for leader, answer in world.sent] == [(0, False), (1, True), (0, True)]


@pytest.mark.parametrize("is_complete", [False, True])
def test_nobody_is_answered_before_there_is_something_to_say(is_complete):
    claims = Claims(0)
    claims.is_complete = is_complete
    answers = deal(claims, [(1, 5), (0, 5)], 2)
    assert answers == ([(1, True, 0), (0, True, 0)] if is_complete else [])
