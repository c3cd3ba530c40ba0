"""Claims in a thread, and what comes back of them."""

import time

import numpy as np
import pytest

from hpcinfer.recovery.claim_ahead import ClaimAhead
from hpcinfer.recovery.claims import Claimer
from hpcinfer.recovery.journal import PartWriter
from hpcinfer.recovery.leases import Lease, incarnation_name


@pytest.fixture
def ahead(make_job):
    """Claims of a job of 40 rows."""
    paths, index = make_job(40)
    with Lease(paths.leases, 1000.0) as lease:
        claims = ClaimAhead(Claimer(paths, index, lease, poll_s=0.05), 2)
        claims.paths, claims.index = paths, index
        yield claims
        claims.close()


def take_all(claims, until):
    """Take claims until there are so many rows."""
    taken, end = [], time.monotonic() + 10
    while sum(len(claim.rows) for claim in taken) < until:
        assert time.monotonic() < end, f"{taken = }"
        claim = claims.take()
        taken += [] if claim is None else [claim]
    return taken


def finish(claims, rows):
    with PartWriter(claims.paths, incarnation_name(), 0) as writer:
        for row in rows:
            writer.append(row, 1, b"line", is_error=False)


def rows_of(taken):
    return sorted(row for claim in taken for row in claim.rows.tolist())


def test_every_row_is_claimed_once_and_those_left_are_counted(ahead):
    assert ahead.num_undealt == 40
    taken = take_all(ahead, 40)
    assert rows_of(taken) == list(range(40)) and ahead.num_undealt == 0
    assert ahead.take() is None and not ahead.is_complete


def test_what_is_given_back_comes_again_without_what_is_held_or_finished(ahead):
    taken = take_all(ahead, 40)
    finish(ahead, [0, 1])
    ahead.give_back({claim.block: claim.rows[~np.isin(claim.rows, [2, 3, 4])] for claim in taken})
    again = take_all(ahead, 35)
    assert rows_of(again) == list(range(5, 40)) and ahead.num_undealt == 0
    assert {claim.generation for claim in again} == {1}  # still this job's


def test_the_end_is_known_when_all_is_finished_though_blocks_came_back(ahead):
    taken = take_all(ahead, 40)
    finish(ahead, range(40))
    ahead.give_back({claim.block: claim.rows for claim in taken})
    ahead.look()
    end = time.monotonic() + 10
    while not ahead.is_complete and time.monotonic() < end:
        time.sleep(0.01)
    assert ahead.is_complete and ahead.take() is None and ahead.num_done == 40


def test_an_error_of_the_thread_is_raised_where_claims_are_taken(ahead, monkeypatch):
    def fail(*_):
        raise OSError("the directory is gone")

    take_all(ahead, 40)
    monkeypatch.setattr(ahead._claimer, "rest", fail)
    ahead.give_back({0: np.arange(3)})
    with pytest.raises(OSError, match="is gone"):
        take_all(ahead, 1)


def test_few_are_claimed_in_advance_unless_all_are_dealt_at_once(ahead):
    def num_claimed():
        return sum(path.is_file() for path in ahead.paths.claims.rglob("*.g*"))

    def wait_for(count):
        end = time.monotonic() + 10
        while num_claimed() < count and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.1)  # for one too many
        return num_claimed()

    in_advance = 2 * 4 + 1  # four for each of two replicas, and one in hand
    assert wait_for(in_advance) == in_advance < ahead.index.num_blocks
    ahead.claim_all()
    assert wait_for(ahead.index.num_blocks) == ahead.index.num_blocks
