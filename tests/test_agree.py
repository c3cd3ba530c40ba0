"""Ranks as threads; the same over MPI is in tests/comm/test_mpi.py."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_group import run_ranks

from hpcinfer.agree import on_all, on_root, same_everywhere, settle, where_am_i
from hpcinfer.comm.serial import SerialGroup
from hpcinfer.errors import ConfigError, HpcInferError, MeshError, PeerError, RequestError, StoreError

ERRORS = [
    HpcInferError("a"), ConfigError("b", expected="c", hint="d"), MeshError("e"), StoreError("file \udcff", where="ü"),
    RequestError("code", "f"), OSError(28, "No space left"), KeyError("x"), ValueError(""),
]  # fmt: skip


@settings(max_examples=40)
@given(errors=st.lists(st.none() | st.sampled_from(ERRORS), min_size=1, max_size=4))
def test_all_ranks_end_together_with_the_first_error(errors):
    results = run_ranks(len(errors), lambda group: settle(group, errors[group.rank]))
    first = next((rank for rank, error in enumerate(errors) if error is not None), None)
    if first is None:
        assert results == [None] * len(errors)
        return
    code = getattr(errors[first], "exit_code", 1)
    for rank, result in enumerate(results):
        if rank == first:
            assert result is errors[first]
        else:
            assert type(result) is PeerError and result.exit_code == code and f"rank {first}/" in result.where


def test_peer_s_message_is_that_of_the_error():
    error = StoreError("flipped", where="x.h5")
    _, peer = run_ranks(2, lambda group: settle(group, None if group.rank else error))
    assert peer.found == "flipped\n  where: x.h5"


def test_exit_code_of_one_error_is_not_that_of_the_next():
    run_ranks(2, lambda group: settle(group, ConfigError("usage") if group.rank == 0 else None))
    assert PeerError("other").exit_code == 1


def test_work_of_all_ranks_gives_each_its_own_result():
    assert run_ranks(3, lambda group: on_all(group, lambda: group.rank * 10)) == [0, 10, 20]


def test_root_s_bytes_reach_all_and_only_it_works():
    calls = []

    def rank_main(group):
        return on_root(group, lambda: calls.append(group.rank) or b"data")

    assert run_ranks(3, rank_main) == [b"data"] * 3 and calls == [0]


def test_root_s_failure_is_everybody_s():
    def fail():
        raise ConfigError("no")

    first, second = run_ranks(2, lambda group: on_root(group, fail))
    assert type(first) is ConfigError and type(second) is PeerError and second.exit_code == 2


def test_first_rank_that_differs_is_named_with_both_values():
    results = run_ranks(4, lambda group: same_everywhere(group, {"same": 1, "x": "ab"[group.rank >= 2]}, "profiles"))
    assert [type(result) for result in results] == [PeerError, PeerError, ConfigError, PeerError]
    assert "profiles differ between ranks: x is 'b'" in str(results[2]) and "as on rank 0: x is 'a'" in str(results[2])
    assert "same" not in str(results[2]).replace("the same", "")
    assert "rank 2/4 on " in results[2].where


def test_one_rank_agrees_with_itself():
    same_everywhere(SerialGroup(), {"any": "thing"}, "profiles")
    assert on_root(SerialGroup(), lambda: b"x") == b"x"
    with pytest.raises(ZeroDivisionError):
        on_all(SerialGroup(), lambda: 1 // 0)


def test_ranks_say_where_they_are():
    assert where_am_i(SerialGroup()).startswith("rank 0/1 on ")
