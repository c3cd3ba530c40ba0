from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.recovery.dealing import STOP, STOPPED, TAG_ROSTER, TAG_WANT, WANT, Answer, Deal, Dealer, Roster

ROWS = st.lists(st.integers(0, 2**40), max_size=9).map(tuple)
DEALS = st.lists(st.builds(Deal, st.integers(0, 2**40), st.integers(1, 2**30), ROWS), max_size=5).map(tuple)


class Claims:
    """Blocks of three rows; what is given back can be taken again at once."""

    def __init__(self, blocks):
        self._blocks = [(block, np.arange(3 * block, 3 * block + 3)) for block in range(blocks)]
        self.is_complete = self.is_all = False

    def claim_all(self):
        self.is_all = True

    def take(self):
        if not self._blocks:
            return None
        block, rows = self._blocks.pop(0)
        return SimpleNamespace(block=block, generation=1, rows=rows)

    def give_back(self, rows):
        self._blocks += [(block, rows[block]) for block in sorted(rows) if len(rows[block])]

    def close(self):
        self._blocks = []

    @property
    def num_undealt(self):
        return 3 * len(self._blocks)


class Mail:
    """Messages in memory."""

    def __init__(self, size):
        self.size, self.dead = size, frozenset()
        self.waiting, self.sent = {TAG_WANT: deque(), TAG_ROSTER: deque()}, []

    def want(self, leader, rows):
        self.waiting[TAG_WANT].append((leader, WANT.pack(rows)))

    def report(self, roster):
        self.waiting[TAG_ROSTER].append((roster.members[0] if roster.members else 0, roster.to_bytes()))

    def failed(self):
        return self.dead

    def probe_bytes(self, tag):
        return self.waiting[tag].popleft() if self.waiting[tag] else None

    def send_bytes(self, data, leader, tag):
        self.sent.append((leader, Answer.from_bytes(data)))
        return SimpleNamespace(test=lambda: True, wait=lambda: None)

    def blocks(self):
        """What was dealt since the last time, by leader."""
        found = {leader: [deal.block for deal in answer.deals] for leader, answer in self.sent}
        self.sent = []
        return found


def make_dealer(claims, num_replicas, size=1):
    """A dealer for replicas of `size` ranks each."""
    mail = Mail(num_replicas * size)
    rosters = [Roster(i, tuple(range(i * size, (i + 1) * size))) for i in range(num_replicas)]
    return mail, Dealer(mail, claims, rosters)


def deal(claims, wants, num_leaders):
    mail, dealer = make_dealer(claims, num_leaders)
    for leader, rows in wants:
        mail.want(leader, rows)
    dealer.serve()
    return [(leader, answer.is_end, sum(len(each.rows) for each in answer.deals)) for leader, answer in mail.sent]


@given(is_end=st.booleans(), deals=DEALS, is_stop=st.booleans())
def test_answers_survive_encoding(is_end, deals, is_stop):
    assert Answer.from_bytes(Answer(is_end, deals, is_stop).to_bytes()) == Answer(is_end, deals, is_stop)


@given(replica=st.integers(0, 9), members=st.lists(st.integers(0, 2**20)).map(tuple), held=st.none() | DEALS)
def test_rosters_survive_encoding(replica, members, held):
    assert Roster.from_bytes(Roster(replica, members, held).to_bytes()) == Roster(replica, members, held)


def test_a_leader_gets_the_rows_that_it_lacks_at_once():
    assert deal(Claims(400), [(0, 10)], 2) == [(0, False, 12)]


def test_few_rows_are_shared_evenly():
    assert deal(Claims(8), [(0, 100), (1, 100)], 2) == [(0, False, 12), (1, False, 12)]


def test_nobody_comes_twice_before_all_came_once():
    assert deal(Claims(8), [(0, 100), (0, 100)], 2) == [(0, False, 12)]
    assert deal(Claims(40), [(0, 6), (0, 100), (1, 3), (1, 30)], 2) == [(0, False, 6), (1, False, 3), (1, False, 30)]


def test_small_jobs_are_dealt_like_cards():
    mail, dealer = make_dealer(Claims(7), 3)
    for leader in (2, 0, 1):
        mail.want(leader, 100)
    dealer.serve()
    assert dealer.claims.is_all
    found = [(leader, [each.block for each in answer.deals]) for leader, answer in mail.sent]
    assert found == [(2, [0, 3, 6]), (0, [1, 4]), (1, [2, 5])]


def test_those_who_had_their_share_hear_of_the_end_though_others_got_nothing():
    claims = Claims(1)
    mail, dealer = make_dealer(claims, 2)
    for leader in (0, 1, 0):
        mail.want(leader, 9)
    dealer.serve()
    claims.is_complete = True
    dealer.serve()
    assert [(leader, answer.is_end) for leader, answer in mail.sent] == [(0, False), (1, True), (0, True)]


@pytest.mark.parametrize("is_complete", [False, True])
def test_nobody_is_answered_before_there_is_something_to_say(is_complete):
    claims = Claims(0)
    claims.is_complete = is_complete
    answers = deal(claims, [(1, 5), (0, 5)], 2)
    assert answers == ([(1, True, 0), (0, True, 0)] if is_complete else [])


# When ranks die, or the job stops.


def test_what_a_dead_leader_was_dealt_and_its_successor_does_not_hold_is_dealt_again():
    mail, dealer = make_dealer(Claims(40), 2, size=2)
    mail.want(0, 9)
    mail.want(2, 9)
    dealer.serve()
    assert mail.blocks() == {0: [0, 1, 2], 2: [3, 4, 5]}
    mail.dead = frozenset({2})
    mail.report(Roster(1, (3,), (Deal(4, 1, (13,)),)))
    dealer.claims._blocks = []
    mail.want(3, 100)
    mail.want(0, 100)
    dealer.serve()
    assert [(leader, [d.rows for d in answer.deals]) for leader, answer in mail.sent] == [
        (3, [(9, 10, 11), (12, 14)]), (0, [(15, 16, 17)])]  # fmt: skip
    mail.dead = frozenset({2, 3})
    mail.want(0, 100)
    dealer.serve()
    assert [roster.replica for roster in dealer.lost()] == [1]
    assert sorted(block for block, _ in dealer.claims._blocks) == [3, 4]


def test_rows_of_a_block_that_others_work_on_since_an_earlier_death_are_not_dealt_again():
    mail, dealer = make_dealer(Claims(2), 3, size=2)
    for leader in (0, 2, 4):
        mail.want(leader, 3)
    dealer.serve()
    assert mail.blocks() == {0: [0], 2: [1]}
    mail.dead = frozenset({2})
    mail.report(Roster(1, (3,), (Deal(1, 1, (3,)),)))
    dealer.serve()
    assert [answer.deals for _, answer in mail.sent] == [(Deal(1, 1, (4, 5)),)]
    mail.dead = frozenset({2, 3})
    mail.want(0, 3)
    dealer.serve()
    assert [roster.replica for roster in dealer.lost()] == [1]
    mail.sent = []
    dealer.serve()
    assert [(leader, answer.deals) for leader, answer in mail.sent] == [(0, (Deal(1, 1, (3,)),))]


def test_a_leader_that_only_lost_a_follower_keeps_its_blocks():
    mail, dealer = make_dealer(Claims(4), 1, size=2)
    mail.want(0, 6)
    dealer.serve()
    mail.dead = frozenset({1})
    mail.report(Roster(0, (0,)))
    dealer.serve()
    assert [block for block, _ in dealer.claims._blocks] == [2, 3] and not dealer.lost()


def test_a_replica_without_ranks_is_lost_once_and_its_blocks_are_dealt_again():
    mail, dealer = make_dealer(Claims(6), 3)
    for leader in range(3):
        mail.want(leader, 6)
    dealer.serve()
    assert mail.blocks() == {0: [0, 3], 1: [1, 4], 2: [2, 5]}
    mail.dead = frozenset({1})
    mail.want(0, 100)
    dealer.serve()
    assert [roster.replica for roster in dealer.lost()] == [1] and not dealer.lost()
    dealer.serve()
    mail.want(2, 100)
    dealer.serve()
    assert mail.blocks() == {0: [1], 2: [4]}


def test_a_replica_that_is_given_up_loses_its_blocks_and_is_not_founded_anew():
    mail, dealer = make_dealer(Claims(2), 2, size=2)
    mail.want(2, 100)
    dealer.serve()
    assert mail.blocks() == {2: [0]}
    mail.report(Roster(1, (), ()))
    dealer.serve()
    assert not dealer.lost()
    mail.want(0, 100)
    dealer.serve()
    assert mail.blocks() == {0: [1, 0]}


def test_who_wants_before_its_roster_is_known_is_answered_after_it():
    mail, dealer = make_dealer(Claims(9), 1, size=2)
    mail.want(1, 3)
    dealer.serve()
    assert mail.blocks() == {}
    mail.dead = frozenset({0})
    mail.report(Roster(0, (1,), ()))
    dealer.serve()
    assert mail.blocks() == {1: [0]}


def test_wants_of_the_dead_are_forgotten():
    mail, dealer = make_dealer(Claims(9), 2)
    mail.want(0, 3)
    dealer.serve()
    mail.want(0, 3)
    mail.want(1, 3)
    mail.dead = frozenset({1})
    dealer.serve()
    assert set(mail.blocks()) == {0}


def test_the_first_round_does_not_wait_for_the_dead():
    mail, dealer = make_dealer(Claims(4), 2)
    mail.want(0, 100)
    dealer.serve()
    mail.want(0, 100)
    dealer.serve()
    assert mail.blocks() == {0: [0, 2]}
    mail.dead = frozenset({1})
    dealer.serve()
    assert mail.blocks() == {0: [1]}


def test_all_leaders_stop_when_one_does_asked_or_not():
    mail, dealer = make_dealer(Claims(9), 3)
    mail.want(1, 3)
    mail.want(2, STOP)
    dealer.serve()
    told = [leader for leader, answer in mail.sent if answer.is_stop and answer.is_end and not answer.deals]
    assert set(told) == {0, 1, 2}
    mail.sent = []
    mail.want(0, 3)
    dealer.serve()
    assert mail.sent == [(0, Answer(True, is_stop=True))]


def test_the_end_is_near_when_the_living_know_of_it(monkeypatch):
    claims = Claims(0)
    claims.is_complete = True
    mail, dealer = make_dealer(claims, 3, size=2)  # and rank 6 is a spare one
    mail.size = 7
    moments = iter(["want 0", "death of 2 and 3", "new leader of 4", "want 5"])

    def pass_a_moment(_):
        match next(moments, ""):
            case "want 0":
                mail.want(0, 1)
            case "death of 2 and 3":
                mail.dead = frozenset({2, 3})
            case "new leader of 4":
                mail.dead = frozenset({2, 3, 4})
                mail.report(Roster(2, (5,), ()))
            case "want 5":
                mail.want(5, 1)

    monkeypatch.setattr("hpcinfer.recovery.dealing.time", SimpleNamespace(sleep=pass_a_moment))
    dealer.close(lambda rank: rank == 6)
    assert next(moments, None) is None
    assert [(leader, answer.is_end) for leader, answer in mail.sent] == [(0, True), (5, True)]


def test_the_claimant_leaves_after_all_that_live_have_stopped(monkeypatch):
    mail, dealer = make_dealer(Claims(9), 3, size=2)
    mail.want(4, STOP)
    moments = iter([lambda: mail.want(0, STOPPED), lambda: mail.want(4, STOPPED), lambda: setattr(
        mail, "dead", frozenset({2, 3}))])  # fmt: skip
    monkeypatch.setattr("hpcinfer.recovery.dealing.time", SimpleNamespace(sleep=lambda _: next(moments, int)()))
    dealer.close(lambda rank: False)
    assert next(moments, None) is None
    assert {leader for leader, answer in mail.sent if answer.is_stop} == {0, 2, 4}
