"""Who is missing, who draws up the report, and what it says: from made-up answers of made-up ranks."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.recovery.hangs.autopsy import (
    Answer,
    Roster,
    Verdict,
    _ranges,
    collector,
    exchange_roster,
    judge,
    write_report,
)
from hpcinfer.recovery.hangs.standstill import Kind
from hpcinfer.recovery.leases import Holder
from hpcinfer.report.slow_ranks import Pace

MOVING, WAITING, IDLE, SPARE, STUCK = Kind.MOVING, Kind.WAITING, Kind.IDLE, Kind.SPARE, Kind.STUCK


def roster(hosts: str, rank: int = 0) -> Roster:
    """A rank for each letter, on the host of that letter."""
    holders = tuple(Holder(f"node-{host}", 100 + i, 1, f"boot-{host}", 7) for i, host in enumerate(hosts))
    return Roster("job", rank, holders)


def answers(*kinds: Kind | None, gone: tuple[int, ...] = ()) -> dict[int, Answer]:
    """Answers by rank; None: silent."""
    return {rank: Answer(rank, kind, gone=gone) for rank, kind in enumerate(kinds) if kind is not None}


@pytest.mark.parametrize(
    ("kinds", "missing"),
    [
        ((WAITING, None), {1: 0}),
        ((None, WAITING), {0: 1}),
        ((WAITING, WAITING, STUCK), {2: 0}),
        ((IDLE, None, MOVING), {1: 0}),
        ((MOVING, MOVING, None), {2: 0}),
        ((WAITING, MOVING, WAITING), {}),
        ((IDLE, IDLE, IDLE), {}),
        ((WAITING, IDLE, WAITING), {}),
    ],
)
def test_silent_and_stuck_ranks_are_missing(kinds: tuple[Kind | None, ...], missing: dict[int, int]) -> None:
    verdict = judge(roster("aaa"[: len(kinds)]), answers(*kinds), (), can_lose_ranks=True)
    assert verdict == Verdict(missing, must_end=False)
    assert verdict.is_hang == bool(missing)


def test_without_fault_tolerance_the_whole_job_ends() -> None:
    assert judge(roster("aaa"), answers(WAITING, None, WAITING), (), can_lose_ranks=False).must_end


def test_rank_that_nobody_can_end_ends_the_job() -> None:
    verdict = judge(roster("aabb"), answers(WAITING, MOVING, None, None), (), can_lose_ranks=True)
    assert verdict.missing == {2: None, 3: None} and verdict.must_end


def test_rank_is_ended_by_one_of_its_host_or_by_itself() -> None:
    verdict = judge(roster("aabbc"), answers(WAITING, MOVING, None, MOVING, STUCK), (), can_lose_ranks=True)
    assert verdict == Verdict({2: 3, 4: 4})


def test_few_do_not_end_many() -> None:
    assert judge(roster("aaa"), answers(WAITING, None, None), (), can_lose_ranks=True).must_end


def test_dead_ranks_are_not_missing() -> None:
    assert not judge(roster("aab"), answers(MOVING, None, None, gone=(1,)), [2], can_lose_ranks=True).is_hang


@pytest.mark.parametrize("kinds", [(WAITING, WAITING), (WAITING, SPARE, WAITING)])
def test_all_wait_for_each_other(kinds: tuple[Kind, ...]) -> None:
    verdict = judge(roster("aaa"[: len(kinds)]), answers(*kinds), (), can_lose_ranks=True)
    assert verdict == Verdict(is_deadlock=True, must_end=True)
    report = write_report(roster("aaa"), verdict, answers(*kinds).values(), {}, 5.0)
    assert report.startswith("hang: no progress for 5.0 s; all ranks wait for each other; the MPI job ends\n")


@given(st.lists(st.sampled_from([*Kind, None]), min_size=1, max_size=6), st.booleans())
def test_verdict_accuses_nobody_who_can_wait_or_move(kinds: list[Kind | None], can_lose_ranks: bool) -> None:
    said = answers(*kinds)
    verdict = judge(roster("ab" * 3), said, range(len(kinds), 6), can_lose_ranks=can_lose_ranks)
    assert all(rank not in said or said[rank].kind is STUCK for rank in verdict.missing)
    assert {rank for rank, kind in enumerate(kinds) if kind in (None, STUCK)} == set(verdict.missing)
    assert Verdict.from_dict(verdict.to_dict()) == verdict


@pytest.mark.parametrize(
    ("kinds", "rank"),
    [((MOVING, WAITING, WAITING), 1), ((STUCK, MOVING, MOVING), 1), ((STUCK, STUCK), 0), ((None, IDLE), 1), ((), -1)],
)
def test_report_is_drawn_up_by_one_who_waits(kinds: tuple[Kind | None, ...], rank: int) -> None:
    assert collector(answers(*kinds)) == rank


def test_report_names_rank_host_operation_and_stack() -> None:
    stack = ("comm/mpi.py:155 all_gather", "hpcinfer/model/decoder.py:79 forward")
    said = {rank: Answer(rank, WAITING, "forward", 40.0, 5.0, stack) for rank in (0, 1, 3)}
    said[4] = Answer(4, STUCK, "journal", 50.0, 5.0, ("hpcinfer/recovery/journal.py:9 flush",))
    said[5] = Answer(5, MOVING)
    everyone = roster("aabbbb")
    verdict = judge(everyone, said, (), can_lose_ranks=True)
    lines = write_report(everyone, verdict, said.values(), {2: "T (stopped) in do_signal_stop"}, 15.0).splitlines()
    assert lines == [
        "hang: no progress for 1 min 00 s; missing, treated as dead:"
        " rank 2/6 on node-b (pid 102), rank 4/6 on node-b (pid 104)",
        "  missing: rank 2/6 on node-b (pid 102): gives no sign of life; T (stopped) in do_signal_stop",
        "  stuck: rank 4/6 on node-b (pid 104): in 'journal' for 1 min 00 s, at",
        "    hpcinfer/recovery/journal.py:9 flush",
        "  waiting: rank 0/6 on node-a (pid 100) and 2 more (1,3): in 'forward' for 50.0 s, at",
        "    comm/mpi.py:155 all_gather",
        "    hpcinfer/model/decoder.py:79 forward",
    ]


def test_ranks_are_written_in_runs() -> None:
    assert _ranges([7, 1, 2, 3, 9, 8]) == "1-3,7-9"


def test_answers_survive_json() -> None:
    pace = Pace(3, "node", 0, 0, 1, 0.5, 2.5, 3, 40)
    answer = Answer(3, STUCK, "journal", 1.5, 0.5, ("a", "b"), {"MainThread": ["c"]}, (1, 2), pace)
    for each in (answer, Answer(0, MOVING)):
        assert Answer.from_dict(json.loads(json.dumps(each.to_dict()))) == each


def test_roster_says_who_is_who() -> None:
    alone = exchange_roster(SerialGroup())
    assert alone == Roster(alone.name, 0, (Holder.this_process(),))
    assert alone.name != exchange_roster(SerialGroup()).name
    assert roster("aba", 0).neighbours() == [2]
