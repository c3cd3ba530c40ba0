import json
import time

import pytest

from hpcinfer.recovery.claims import Claimer
from hpcinfer.recovery.journal import PartWriter
from hpcinfer.recovery.leases import Lease, incarnation_name


def _finish(paths, claim, attempt=0, is_error=False):
    with PartWriter(paths, incarnation_name(), attempt) as writer:
        for row in claim.rows.tolist():
            writer.append(row, claim.generation, b"line %d" % row, is_error=is_error)


def _claims(claimer):
    claims = []
    while (claim := claimer.claim()) is not None:
        claims.append(claim)
    return claims


@pytest.fixture
def leases(make_job):
    started = []

    def start(paths, timeout_s=1000.0):
        started.append(Lease(paths.leases, timeout_s).start())
        return started[-1]

    yield start
    for lease in started:
        lease.close()


def test_one_claimant_gets_every_block_once_in_order_of_work(make_job, leases):
    paths, index = make_job(100)
    claims = _claims(Claimer(paths, index, leases(paths)))
    assert [claim.block for claim in claims] == list(range(index.num_blocks))
    assert sorted(row for claim in claims for row in claim.rows.tolist()) == list(range(100))
    assert {claim.generation for claim in claims} == {1}


def test_job_is_complete_when_all_rows_are_in_the_journal(make_job, leases):
    paths, index = make_job(30)
    claimer = Claimer(paths, index, leases(paths), poll_s=0)
    while (claim := claimer.claim()) is not None:
        assert not claimer.is_complete()
        _finish(paths, claim)
    claimer.refresh()
    assert claimer.is_complete() and claimer.num_done == 30


def test_blocks_of_a_living_job_are_left_alone(make_job, leases):
    paths, index = make_job(30)
    first, second = (Claimer(paths, index, leases(paths), poll_s=0) for _ in range(2))
    assert len(_claims(first)) == index.num_blocks
    assert second.claim() is None and not second.is_complete()


def test_clean_end_frees_unfinished_blocks_at_once(make_job, leases):
    paths, index = make_job(40)
    lease = leases(paths)
    first, second = Claimer(paths, index, lease, poll_s=0), Claimer(paths, index, leases(paths), poll_s=0)
    claims = _claims(first)
    _finish(paths, claims[0])
    _finish(paths, claims[1]._replace(rows=claims[1].rows[:1]))
    assert second.claim() is None
    lease.close()
    taken = []
    deadline = time.monotonic() + 5
    while len(taken) < index.num_blocks - 1 and time.monotonic() < deadline:
        taken += _claims(second)
    assert {claim.generation for claim in taken} == {2}
    rows = sorted(row for claim in taken for row in claim.rows.tolist())
    assert rows == sorted(set(range(40)) - set(claims[0].rows.tolist()) - {int(claims[1].rows[0])})


def test_what_the_last_owner_finished_is_not_dealt_again(make_job, leases):
    paths, index = make_job(30)
    lease = leases(paths)
    first, second = Claimer(paths, index, lease), Claimer(paths, index, leases(paths), poll_s=1000)
    claims = _claims(first)
    lease.close()
    late = Claimer(paths, index, leases(paths), poll_s=1000)  # knows now that every block is free to take
    for claim in claims:
        _finish(paths, claim)
    assert late.claim() is None and late.is_complete()
    assert second.claim() is None


def test_two_observers_do_not_both_take_over(make_job, leases):
    paths, index = make_job(50)
    lease = leases(paths)
    _claims(Claimer(paths, index, lease))
    lease.close()
    both = [Claimer(paths, index, leases(paths)) for _ in range(2)]
    taken = [claim for pair in zip(*map(_claims, both), strict=False) for claim in pair]
    taken += [claim for claimer in both for claim in _claims(claimer)]
    assert len({claim.block for claim in taken}) == len(taken)


def test_torn_claim_belongs_to_nobody(make_job, leases):
    paths, index = make_job(30)
    claimer = Claimer(paths, index, leases(paths))
    claim = claimer.claim()
    path = next(paths.claims.glob(f"*/{claim.block}.g1"))
    assert json.loads(path.read_text())["lease"]
    path.write_bytes(b"")
    other = Claimer(paths, index, leases(paths))
    assert other.claim()[:2] == (claim.block, 2)


def test_errors_of_an_earlier_attempt_are_work_again(make_job, leases):
    paths, index = make_job(30)
    lease = leases(paths)
    claims = _claims(Claimer(paths, index, lease))
    lease.close()
    for number, claim in enumerate(claims):
        _finish(paths, claim, is_error=number == 2)
    assert Claimer(paths, index, leases(paths)).is_complete()
    retry = Claimer(paths, index, leases(paths), 1)
    again = _claims(retry)
    assert [(claim.block, claim.attempt) for claim in again] == [(claims[2].block, 1)]
    _finish(paths, again[0], attempt=1, is_error=True)
    retry.refresh()
    assert retry.is_complete()


def test_processes_at_once_give_each_block_one_owner(make_job, tmp_path, children):
    paths, index = make_job(400)

    def job(number):
        with Lease(paths.leases, 1000) as lease:
            blocks = [claim.block for claim in _claims(Claimer(paths, index, lease))]
            (tmp_path / f"blocks{number}").write_text(json.dumps(blocks))
            while len(list(tmp_path.glob("blocks*"))) < 5:
                time.sleep(0.01)

    for number in range(5):
        children.start(lambda number=number: job(number))
    children.wait()
    found = [json.loads(path.read_text()) for path in tmp_path.glob("blocks*")]
    assert sorted(sum(found, [])) == list(range(index.num_blocks))


def test_killed_job_loses_its_blocks_at_once_and_nothing_is_done_twice(make_job, children, leases):
    paths, index = make_job(300)

    def job():
        with Lease(paths.leases, 1000) as lease:
            claimer = Claimer(paths, index, lease)
            while (claim := claimer.claim()) is not None:
                _finish(paths, claim)
                time.sleep(0.003)

    for delay_s in (0.05, 0.12):
        pid = children.start(job)
        time.sleep(delay_s)
        children.kill(pid)
    claimer = Claimer(paths, index, leases(paths), poll_s=0)
    finished_before = claimer.num_done
    rest = 0
    while (claim := claimer.claim()) is not None:
        _finish(paths, claim)
        rest += len(claim.rows)
    claimer.refresh()
    assert claimer.is_complete() and finished_before + rest == 300
