"""Desks of several leaders over one job directory, while leaders and claimants die: every row is served once."""

import itertools
import random
import time
from collections import deque
from types import SimpleNamespace

import pytest

from hpcinfer.recovery import desk
from hpcinfer.recovery.dealing import TAG_DEAL, TAG_WANT, Answer, Deal, Roster
from hpcinfer.recovery.desk import Desk, Office
from hpcinfer.recovery.election import Election
from hpcinfer.recovery.journal import PartWriter
from hpcinfer.recovery.leases import incarnation_name
from hpcinfer.recovery.sidecar import JournalReader
from hpcinfer.recovery.stopping import Stopper

NUM_ROWS = 120
LIMIT_S = 30
GROUP = 5  # lines that become durable together


class Post:
    """The messages of all ranks."""

    def __init__(self, size):
        self.size, self.dead, self.boxes = size, frozenset(), {}


class Mail:
    """What one rank sees of it."""

    def __init__(self, post, rank):
        self._post, self.rank, self.size = post, rank, post.size

    def failed(self):
        return self._post.dead

    def send_bytes(self, data, peer, tag):
        if peer not in self._post.dead:
            self._post.boxes.setdefault((peer, tag), deque()).append((self.rank, data))
        return SimpleNamespace(test=lambda: True, wait=lambda: None)

    def probe_bytes(self, tag):
        box = self._post.boxes.get((self.rank, tag))
        return box.popleft() if box else None


class Replica:
    """A leader that serves what it is dealt, one row at a time; its lines are durable some at a time."""

    def __init__(self, company, number, members):
        self.members, self.held, self.is_dead, self.num_pending = members, {}, False, 0
        mail = Mail(company.post, members[0])
        self.election = Election(company.paths.claimants, "job", 0)
        office = Office(mail, company.job, self.election, 1000.0, company.rosters, True, lambda rank: False,
                        company.lost.append, company.stopper)  # fmt: skip
        self.roster, self.desk = Roster(number, members), Desk(office, Roster(number, members))
        self.writer = PartWriter(company.paths, incarnation_name(), 0).__enter__()

    def tell(self):
        """What it works on; what it has finished is durable then."""
        self.writer.flush()
        return tuple(Deal(block, generation, tuple(sorted(rows))) for (block, generation), rows in self.held.items())

    def turn(self, wanted=10):
        """Ask, take, and finish one row."""
        if sum(map(len, self.held.values())) < wanted:
            self.desk.ask(wanted)
        for deal in self.desk.turn(self.tell):
            self.held.setdefault((deal.block, deal.generation), set()).update(deal.rows)
        for (block, generation), rows in list(self.held.items())[:1]:
            self.writer.append(rows.pop(), generation, b"line", is_error=False)
            self.num_pending = (self.num_pending + 1) % GROUP
            if not rows:
                del self.held[block, generation]
        if not self.held or not self.num_pending:
            self.writer.flush()
        self.desk.look()

    def crash(self):
        """End, with the lines that are not durable."""
        self.is_dead, self.writer._lines, self.writer._entries = True, [], []


class Company:
    """All replicas of an MPI job."""

    def __init__(self, paths, index, num_replicas, size):
        self.paths, self.job = paths, SimpleNamespace(paths=paths, index=index, attempt=0)
        self.post, self.stopper, self.lost = Post(num_replicas * size), Stopper(), []
        members = [tuple(range(i * size, (i + 1) * size)) for i in range(num_replicas)]
        self.rosters = tuple(Roster(i, ranks) for i, ranks in enumerate(members))
        self.replicas = [Replica(self, i, ranks) for i, ranks in enumerate(members)]
        self.all = list(self.replicas)
        self.replicas[0].desk.open()

    def kill(self, replica):
        """End its leader; a follower takes its place with what it knows, if there is one."""
        self.post.dead |= {replica.members[0]}
        self.replicas.remove(replica)
        replica.crash()
        if len(replica.members) > 1:
            heir = Replica(self, replica.roster.replica, replica.members[1:])
            heir.held = {key: set(rows) for key, rows in list(replica.held.items())[::2]}  # the rest it never heard of
            self.all.append(heir)
            self.replicas.append(heir)
            heir.desk.report(heir.roster._replace(held=heir.tell()))

    def is_ended(self):
        return all(replica.desk.is_ended and not replica.held for replica in self.replicas)

    def run(self, until=lambda: False):
        """Let all work in turn until the end, or until something has happened."""
        end = time.monotonic() + LIMIT_S
        while not self.is_ended() and not until():
            assert time.monotonic() < end, [(each.members, each.desk.is_ended, each.held) for each in self.replicas]
            for replica in list(self.replicas):
                replica.turn()
            time.sleep(0.001)

    def num_lines(self):
        """Lines of each row."""
        counts = [0] * NUM_ROWS
        for part in JournalReader(self.paths).read():
            for row in part.entries["row"].tolist():
                counts[row] += 1
        return counts

    def close(self):
        """End the threads of all, as processes end theirs."""
        for replica in self.all:
            replica.writer.__exit__(None, None, None)
            if replica.desk._dealer is not None:
                replica.desk._dealer.claims.close()
            replica.desk.release()


@pytest.fixture
def found(make_job):
    companies = []

    def make(num_replicas, size=1):
        companies.append(Company(*make_job(NUM_ROWS), num_replicas, size))
        return companies[-1]

    yield make
    for company in companies:
        company.close()


def test_leaders_share_the_rows_and_hear_of_the_end(found):
    company = found(3)
    company.run()
    assert company.num_lines() == [1] * NUM_ROWS
    assert company.replicas[0].desk.is_claimant and company.replicas[0].desk.is_complete
    assert not company.replicas[1].desk.is_claimant and not company.lost
    assert company.replicas[1].election.follow().number == 0


@pytest.mark.parametrize("moment", [0, 1, 5, 30])
def test_another_leader_becomes_the_claimant_when_it_dies(found, moment):
    company = found(3)
    rounds = itertools.count()
    company.run(until=lambda: next(rounds) >= moment)
    company.kill(company.replicas[0])
    company.run()
    assert company.num_lines() == [1] * NUM_ROWS
    assert [replica.desk.is_claimant for replica in company.replicas].count(True) == 1
    assert [roster.replica for roster in company.lost] == [0]


def test_a_follower_that_follows_its_leader_may_be_the_next_claimant(found):
    company = found(1, size=3)
    for _ in range(2):
        company.run(until=lambda: company.replicas[0].desk._dealer is not None and company.replicas[0].held)
        company.kill(company.replicas[0])
    company.run()
    assert company.num_lines() == [1] * NUM_ROWS and not company.lost
    assert company.replicas[0].members == (2,) and company.replicas[0].election.term.number == 2


@pytest.mark.parametrize("seed", range(6))
def test_whoever_dies_whenever_each_row_is_served_once(found, seed):
    choices = random.Random(seed)
    company = found(choices.randint(2, 4), size=choices.randint(1, 2))
    for _ in range(choices.randint(1, company.post.size - 1)):
        rounds, moment = itertools.count(), choices.choice([0, 1, 3, 10, 30])
        company.run(until=lambda rounds=rounds, moment=moment: next(rounds) >= moment)
        if len(company.replicas) > 1 or len(company.replicas[0].members) > 1:
            company.kill(choices.choice(company.replicas))
    company.run()
    assert company.num_lines() == [1] * NUM_ROWS


@pytest.mark.parametrize("moment", [0, 1, 3])
def test_a_replica_that_dies_bit_by_bit_has_no_row_served_twice(found, moment):
    """Of its blocks others work on a part by then; it has been slow since its leader died."""
    company = found(3, size=2)
    company.run(until=lambda: all(replica.held for replica in company.replicas))
    company.kill(company.replicas[2])
    heir = company.replicas.pop()
    shared = {block for block, _ in heir.held}
    company.run(until=lambda: any(shared & {block for block, _ in each.held} for each in company.replicas))
    rounds = itertools.count()
    company.run(until=lambda: next(rounds) >= moment)
    company.replicas.append(heir)
    company.kill(heir)
    company.run()
    assert company.num_lines() == [1] * NUM_ROWS and [roster.replica for roster in company.lost] == [2]


def test_a_reason_to_stop_of_one_leader_stops_all(found):
    company = found(3)
    company.run(until=lambda: all(replica.held for replica in company.replicas))
    company.replicas[2].desk.stop()
    end = time.monotonic() + 10
    while not all(replica.desk.is_stopping() for replica in company.replicas) and time.monotonic() < end:
        for replica in company.replicas:
            replica.turn(wanted=0)
    assert all(replica.desk.is_stopped and replica.desk.is_ended for replica in company.replicas)
    assert sum(company.num_lines()) < NUM_ROWS


def test_a_wish_to_stop_outlives_the_claimant_that_heard_it(found):
    company = found(3)
    company.replicas[1].desk.stop()
    company.kill(company.replicas[0])
    end = time.monotonic() + 10
    while not all(replica.desk.is_stopped for replica in company.replicas) and time.monotonic() < end:
        for replica in company.replicas:
            replica.turn(wanted=0)
    assert all(replica.desk.is_stopped for replica in company.replicas)


def test_answers_of_a_dead_claimant_count_no_more(found):
    company = found(2)
    second = company.replicas[1]
    second.desk.ask(5)
    company.post.boxes[1, TAG_DEAL] = deque([(0, Answer(False, (Deal(99, 1, (7,)),)).to_bytes())])
    company.kill(company.replicas[0])
    assert second.desk.turn(second.tell) == ()
    assert second.desk.is_claimant
    company.run()
    assert company.num_lines() == [1] * NUM_ROWS


def test_no_second_question_before_the_answer(found):
    company = found(2)
    second = company.replicas[1]
    second.desk.ask(5)
    second.desk.ask(7)
    assert len(company.post.boxes[0, TAG_WANT]) == 1
    second.desk.report(second.roster)  # after which the claimant may not know of the question
    second.desk.ask(5)
    assert len(company.post.boxes[0, TAG_WANT]) == 2


def test_claimant_knows_how_the_replicas_are(found, monkeypatch):
    company, said = found(3, size=2), set()
    monkeypatch.setattr(desk.Desk, "_pulse_s", 0.001)

    def is_told(words):
        claimant = company.replicas[0].desk
        said.add(claimant._describe_health())
        return any(words in each for each in said)

    company.replicas[1].desk._office.timeline.step(500)
    company.run(until=lambda: is_told("3/3 replicas"))
    company.post.dead |= {company.replicas[2].roster.leader}
    company.replicas.pop().is_dead = True
    company.run(until=lambda: is_told("replica 2 recovering"))
    assert is_told("0.0 output tokens/s, 3/3 replicas") and is_told("2/3 replicas, replica 2 recovering"), said
    assert not company.replicas[1].desk._describe_health(), "only the claimant knows"
