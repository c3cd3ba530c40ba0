from made_up_report import made_up_rank

from hpcinfer.report.balance import balance


def test_tail_begins_when_the_first_replica_has_no_work():
    found = balance([made_up_rank(0, until_s=60.0), made_up_rank(0, 0, 1), made_up_rank(1, until_s=90.0)])
    assert (found.run_s, found.tail_s) == (100.0, 40.0)
    assert found.idle_rank_s == 2 * 40.0 + 10.0
    assert found.tail_idle_share == 90.0 / (40.0 * 3) and found.run_idle_share == 0.3
    assert [(each.replica, each.ranks, each.output_tokens) for each in found.replicas] == [(0, 2, 2400), (1, 1, 3600)]
    assert found.token_spread == 1.2


def test_nobody_is_even():
    found = balance([made_up_rank(place={})])
    assert (found.replicas, found.tail_s, found.token_spread, found.tail_idle_share) == ((), 0.0, 1.0, 0.0)
    assert found.to_json()["replicas"] == []


def test_leader_that_joined_late_takes_no_work_from_the_tail():
    leaders = [made_up_rank(0, until_s=30.0), made_up_rank(0, until_s=80.0)]  # the second one went on
    assert balance([*leaders, made_up_rank(1, until_s=90.0)]).tail_s == 20.0
