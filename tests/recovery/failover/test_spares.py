"""Who is free, as far as a rank has heard."""

from collections import deque
from types import SimpleNamespace

from hpcinfer.recovery.failover.spares import Spares


class Mail:
    """Mail of one of some ranks that share a table of messages."""

    def __init__(self, table, rank):
        self._table, self.rank, self.size, self.dead = table, rank, len(table), frozenset()

    def failed(self):
        return self.dead

    def probe_bytes(self, tag):
        return self._table[self.rank].popleft() if self._table[self.rank] else None

    def send_bytes(self, data, peer, tag):
        assert peer not in self.dead
        self._table[peer].append((self.rank, data))
        return SimpleNamespace(test=lambda: True)


def make(size, spares):
    table = [deque() for _ in range(size)]
    mails = [Mail(table, rank) for rank in range(size)]
    return mails, [Spares(mail, spares) for mail in mails]


def test_those_kept_from_the_start_are_known_until_they_join_or_die():
    mails, (own, *_) = make(4, [2, 3])
    assert own.known() == [2, 3] and own.is_idle(3) and not own.is_idle(1)
    own.forget([3, 1])
    assert own.known() == [2]
    mails[0].dead = frozenset({2})
    assert own.known() == []


def test_everybody_hears_who_has_become_free_also_again():
    mails, all_spares = make(3, [])
    mails[1].dead = frozenset({0})
    all_spares[1].announce(is_free=True)
    assert all_spares[2].is_idle(1) and not all_spares[2].is_idle(2)
    assert not all_spares[0].is_idle(1)  # it counted as dead
    all_spares[2].forget([1])
    assert not all_spares[2].is_idle(1)
    all_spares[1].announce(is_free=True)
    assert all_spares[2].known() == [1]


def test_everybody_hears_who_is_free_no_more():
    _, all_spares = make(3, [1, 2])
    all_spares[1].announce(is_free=False)
    assert [spares.known() for spares in all_spares] == [[2], [2], [2]]
    all_spares[1].announce(is_free=True)
    all_spares[1].announce(is_free=False)
    assert all_spares[0].known() == [2]
