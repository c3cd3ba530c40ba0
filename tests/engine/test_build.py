"""A replica that cannot be built leaves no rank waiting, and nothing open."""

from types import SimpleNamespace

import pytest
import thread_group
from models import make_tiny_model
from stages import MemoryStore
from thread_group import run_ranks

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.config import EngineOptions, ModelOptions
from hpcinfer.engine import replica as module
from hpcinfer.engine.groups import Groups
from hpcinfer.engine.options import ReplicaOptions
from hpcinfer.engine.placement import check_sharing, make_kernels
from hpcinfer.engine.replica import build_replica
from hpcinfer.errors import ConfigError, PeerError, RankFailedError
from hpcinfer.kernels.reference import ReferenceKernels
from hpcinfer.partition.mesh import Mesh

OPTIONS = ReplicaOptions(EngineOptions(max_num_batched_tokens=16, max_num_seqs=2), "float32", 32, seed=0)


class OnDevice(ReferenceKernels):
    """Kernels that have memory of their own; a rank may fail at an array function."""

    def __init__(self, failing="", error=MemoryError):
        super().__init__()
        self._failing, self._error = failing, error

    def free_bytes(self):
        return 1 << 28

    def kv_cache(self, *sizes):
        self._fail("kv_cache")
        return super().kv_cache(*sizes)

    def mlp(self, *arguments):
        self._fail("mlp")
        return super().mlp(*arguments)

    def prepare_mlp(self, weights, eps):
        self._fail("prepare_mlp")
        return super().prepare_mlp(weights, eps)

    def _fail(self, name):
        if name == self._failing:
            raise self._error("no room")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return MemoryStore(make_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", num_hidden_layers=1))


@pytest.fixture
def closed(monkeypatch):
    """Counts groups that are closed."""
    count, close = [], Groups.close
    monkeypatch.setattr(Groups, "close", lambda groups: count.append(groups) or close(groups))
    return count


@pytest.mark.parametrize("what", ["kv_cache", "prepare_mlp"])
def test_what_one_rank_has_no_memory_for_is_an_error_of_all(store, closed, what):
    def build(group):
        kernels = OnDevice(what if group.rank == 1 else "")
        try:
            build_replica(group, Mesh(1, 1, 2), store, kernels, OPTIONS)
        finally:
            assert kernels.while_waiting is None

    first, second = run_ranks(2, build)
    assert isinstance(first, PeerError) and isinstance(second, ConfigError)
    assert "no memory for" in first.found and len(closed) == (2 if what == "kv_cache" else 0)


def test_a_rank_that_fails_between_sums_ends_all(store, closed, monkeypatch):
    ended = []

    def end(group, error):
        ended.append((group.rank, str(error)))
        group.abort(1)

    monkeypatch.setattr(module, "end_all", end)
    monkeypatch.setattr(thread_group, "_LIMIT_S", 1)  # nobody is ended here: the other one waits so long

    def build(group):
        build_replica(group, Mesh(1, 1, 2), store, OnDevice("mlp" if group.rank == 1 else "", ValueError), OPTIONS)

    assert all(isinstance(each, BaseException) for each in run_ranks(2, build))
    assert ended[0] == (1, "no room") and closed


def test_groups_are_closed_after_a_death_in_the_middle(store, closed, monkeypatch):
    def die(*_):
        raise RankFailedError("rank 1 has died")

    monkeypatch.setattr(module, "choose_num_blocks", die)
    kernels = OnDevice()
    with pytest.raises(RankFailedError):
        build_replica(SerialGroup(), Mesh(1, 1, 1), store, kernels, OPTIONS)
    assert len(closed) == 1 and kernels.while_waiting is None


def test_weights_of_the_last_place_are_let_go_before_memory_is_counted(store, monkeypatch):
    order, choose = [], module.choose_num_blocks
    monkeypatch.setattr(module, "choose_num_blocks", lambda *a: order.append("counted") or choose(*a))
    build_replica(SerialGroup(), Mesh(1, 1, 1), store, OnDevice(), OPTIONS, on_loaded=lambda: order.append("let go"))
    assert order == ["let go", "counted"]


@pytest.mark.parametrize(("gpus", "ranks_per_gpu", "words"), [
    ("abc", 1, ""), ("aab", 2, ""), ("aab", 1, "ranks 0, 1 have one GPU"), ("aaa", 2, "ranks 0, 1, 2"),
])
def test_more_ranks_on_a_gpu_than_were_asked_for_are_refused(gpus, ranks_per_gpu, words):
    def check(group):
        arrays = SimpleNamespace(gpu_id=gpus[group.rank])
        kernels = SimpleNamespace(device_arrays=lambda: arrays, free_bytes=lambda: 1)
        check_sharing(group, kernels, ranks_per_gpu)

    found = run_ranks(3, check)
    assert words in str(found[0]) if words else found == [None] * 3


def test_a_gpu_has_one_rank_at_least():
    with pytest.raises(ConfigError, match="--ranks-per-gpu 0"):
        make_kernels(ModelOptions(device="cuda", ranks_per_gpu=0), None)
