"""Terms: one claimant after another, each by a file that can be linked only once."""

import random

import pytest

from hpcinfer.recovery.election import Election, Term


@pytest.fixture
def make(tmp_path):
    return lambda name="job": Election(tmp_path / "claimants", name, 0)


def test_the_first_term_needs_no_election(make):
    assert make().term == Term(0, 0, "") == make().follow()
    assert make().former_leases() == []


def test_of_two_that_stand_for_one_term_one_wins_and_both_know_who(make):
    first, second = make(), make()
    assert first.stand(3, "lease-3") and not second.stand(4, "lease-4")
    assert first.term == second.term == Term(1, 3, "lease-3")


def test_who_did_not_know_of_a_living_claimant_does_not_follow_it(make):
    """What a rank read before may be old: the next term is only begun after the one that is known to be dead."""
    elected, late = make(), make()
    late.follow()
    assert elected.stand(3, "lease-3")
    assert not late.stand(4, "lease-4")
    assert make().follow() == Term(1, 3, "lease-3")


def test_terms_follow_one_another_and_leave_their_leases(make):
    claimants = [make() for _ in range(3)]
    claimants[0].begin("lease-0")
    assert claimants[1].stand(1, "lease-1")
    claimants[2].follow()
    assert claimants[2].stand(2, "lease-2")
    assert make().follow().rank == 2
    assert claimants[2].former_leases() == ["lease-0", "lease-1"]
    assert claimants[1].former_leases() == ["lease-0"]


def test_a_first_claimant_that_died_before_it_began_is_followed_too(make):
    heir = make()
    assert heir.stand(5, "lease-5") and heir.former_leases() == []


def test_jobs_that_share_a_directory_elect_for_themselves(make):
    assert make("one").stand(1, "a") and make("two").stand(2, "b")
    assert make("one").follow().rank == 1 and make("two").follow().rank == 2


def test_of_processes_at_once_one_wins_each_term(make, tmp_path, children):
    def stand(number):
        election, won = make(), []
        choices = random.Random(number)
        while election.follow().number < 20:
            if choices.random() < 0.5 and election.stand(number, f"lease-{number}"):
                won.append(election.term.number)
        (tmp_path / f"won-{number}").write_text(" ".join(map(str, won)))

    for number in range(4):
        children.start(lambda number=number: stand(number))
    children.wait()
    won = [int(term) for path in tmp_path.glob("won-*") for term in path.read_text().split()]
    assert sorted(won) == list(range(1, max(won) + 1)) and max(won) >= 20
