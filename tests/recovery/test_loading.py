"""Loading as ranks do it together, in one process: also where threads may not call the MPI, and where things fail."""

import threading
import time

import pytest
from models import make_tiny_model
from thread_group import run_ranks

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.errors import HpcInferError, PeerError, RankFailedError, RevokedError
from hpcinfer.kernels import create_kernels
from hpcinfer.model import delivery
from hpcinfer.model.shard import shard_plan
from hpcinfer.model.weights_of import LoadOptions
from hpcinfer.partition.layout import ModelLimits, layout_of
from hpcinfer.partition.mesh import Mesh
from hpcinfer.recovery import loading as module
from hpcinfer.recovery.loading import JobLoading
from hpcinfer.report.metrics import Metrics
from hpcinfer.weights.conversion import convert
from hpcinfer.weights.reader import Store

MESH = Mesh(2, 1, 1)
LIMIT_S = 20


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading")
    convert(make_tiny_model(folder / "model", "qwen2", num_hidden_layers=6), folder / "store", SerialGroup())
    return folder / "store"


@pytest.fixture(params=[True, False], ids=["threads", "no threads"])
def threads(request, monkeypatch):
    monkeypatch.setattr(module, "has_threads", lambda: request.param)
    monkeypatch.setattr(delivery, "MOST_AHEAD", 2)
    return request.param


class Sick:
    """Kernels that cannot prepare the second layer; `calls` are of all functions."""

    def __init__(self, error=None):
        self._kernels, self._error, self.calls = create_kernels("reference"), error, []

    def __getattr__(self, name):
        self.calls.append(name)
        if self._error is not None and self.calls.count("prepare_mlp") == 2:
            raise self._error
        return getattr(self._kernels, name)


def start(path, group, mesh=MESH):
    store = Store.open(path)
    layout = layout_of(mesh, range(mesh.world_size), ModelLimits(store.config.num_layers, store.grains))
    return store, JobLoading(store, layout)


def load(store, loading, kernels, metrics=None):
    plan = shard_plan(store.config, store.grains, MESH, MESH.coord(0))
    return loading.load(kernels, metrics or Metrics(), plan, LoadOptions(max_len=8))


def in_time(work):
    """Run two ranks; neither may hang."""
    results = []
    thread = threading.Thread(target=lambda: results.extend(run_ranks(2, work)), daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    assert not thread.is_alive(), "a rank hangs"
    return results


def test_all_get_all(path, threads):
    def work(group):
        store, loading = start(path, group)
        loading.begin(group, None)
        kernels = Sick()
        stage = load(store, loading, kernels)
        num_layers = len(list(stage.layers))
        loading.finish()
        report = loading.report()
        return num_layers, kernels.calls.index("bind_workers") < kernels.calls.index("prepare_table"), report

    results = in_time(work)
    assert [result[:2] for result in results] == [(6, True)] * 2, results
    assert all(report["bytes_received"] > 0 and report["last_layer_s"] > 0 for *_, report in results)


def test_who_cannot_prepare_its_weights_still_serves_others(path, threads, caplog):
    def work(group):
        store, loading = start(path, group)
        loading.begin(group, None)
        stage = load(store, loading, Sick(MemoryError("no room") if group.rank == 0 else None))
        loading.finish()
        return stage.is_complete, stage.error, loading.report()["last_byte_s"]

    (failed, error, last_s), (is_complete, *_) = in_time(work)
    assert not failed and isinstance(error, MemoryError) and last_s > 0
    assert is_complete
    assert [record.getMessage() for record in caplog.records] == [
        "weights that were not needed here did not come: no room"
    ]


def test_what_fails_on_one_rank_fails_where_all_hear_of_it(path, monkeypatch):
    def plan(config, grains, mesh, coord):
        if threading.current_thread().name == "sick":
            raise HpcInferError("here alone")
        return shard_plan(config, grains, mesh, coord)

    monkeypatch.setattr(module, "shard_plan", plan)
    monkeypatch.setattr(module, "has_threads", lambda: True)

    def work(group):
        threading.current_thread().name = "sick" if group.rank == 1 else "healthy"
        store, loading = start(path, group)
        try:
            loading.begin(group, None)
        finally:
            loading.stop()

    first, second = in_time(work)
    assert isinstance(first, PeerError) and isinstance(second, HpcInferError) and "alone" in str(second)


def test_who_stops_leaves_at_once(path, monkeypatch):
    monkeypatch.setattr(module, "has_threads", lambda: True)

    def work(group):
        store, loading = start(path, group)
        loading.begin(group, None)
        if group.rank == 0:
            stage = load(store, loading, Sick())
            begin = time.monotonic()
            loading.stop()
            return time.monotonic() - begin, stage.is_complete
        return None

    (seconds, is_complete), _ = in_time(work)
    assert seconds < 5 and not is_complete


def test_what_is_loaded_in_part_is_held_for_another_place(path, monkeypatch):
    monkeypatch.setattr(module, "has_threads", lambda: True)

    def work(group):
        store, loading = start(path, group)
        loading.begin(group, None)
        assert loading.held() is None
        if group.rank == 1:
            loading.abandon()  # gives what it has to
            loading.finish()
            return loading.report()["bytes_sent"]
        load(store, loading, Sick())
        held = loading.held()
        name = "layers.3.up_proj.weight"
        whole = held.fetch(name, held.held(name))
        loading.release()
        assert loading.held() is None
        loading.finish()
        return whole is None  # the reference kernels give nothing back

    told, sent = in_time(work)
    assert told is True and sent > 0, (told, sent)


class Group:
    """Of two ranks, one of which has died for the other one only: that one waits until the group is revoked."""

    def __init__(self, rank, revoked):
        self.rank, self._revoked = rank, revoked

    def all_gather_bytes(self, data):
        if self.rank == 0:
            raise RankFailedError("a rank has died")
        assert self._revoked.wait(LIMIT_S)
        raise RevokedError("revoked")

    def revoke(self):
        self._revoked.set()


class Line:
    """Agrees when both have come."""

    def __init__(self, meeting):
        self._meeting = meeting

    def agree(self, *, is_good):
        self._meeting.wait(LIMIT_S / 2)
        return is_good


def test_a_death_while_copies_are_told_leaves_nobody_waiting(path):
    revoked, meeting = threading.Event(), threading.Barrier(2)

    def work(group):
        with Store.open(path) as store:
            there = Group(group.rank, revoked)
            return module._agreed(there, Line(meeting), lambda: module._gather_copies(store, there))

    assert in_time(work) == [None, None]


def test_a_report_from_another_thread_may_fall_into_the_end(path):
    class Vanishing(JobLoading):
        """Whose stage is there when it is looked at once, and then no more."""

        looks = 0

        @property
        def _stage(self):
            self.looks += 1
            return self._found if self.looks == 1 else None

        @_stage.setter
        def _stage(self, stage):
            self._found = stage

    with Store.open(path) as store:
        layout = layout_of(Mesh(1, 1, 1), range(1), ModelLimits(store.config.num_layers, store.grains))
        loading = Vanishing(store, layout)
        loading.begin(SerialGroup(), None)
        stage = load(store, loading, Sick())
        stage.wait()
        loading.looks = 0
        assert loading.report()["last_layer_s"] > 0
