"""Who goes on after a death, and as what."""

from types import SimpleNamespace

import pytest

from hpcinfer.comm.regroup import View
from hpcinfer.partition.layout import ModelLimits, layout_of
from hpcinfer.partition.mesh import Mesh
from hpcinfer.partition.topology import Location
from hpcinfer.recovery.election import Term
from hpcinfer.recovery.failover import succession as module
from hpcinfer.recovery.failover.state import State
from hpcinfer.recovery.failover.succession import Plan, Succession

ROOM = 10**12


class Scene:
    """A world in which some ranks are dead and some are idle."""

    def __init__(self, monkeypatch, mesh, size, *, dead=(), idle=(), claimant=0, bytes_of=lambda mesh: 1,
                 nodes=None):  # fmt: skip
        self.founded, self.idle = [], list(idle)
        self.locations = nodes and [Location((), node, 0) for node in nodes]
        monkeypatch.setattr(module, "needed_bytes", lambda store, mesh, options, value_bytes: bytes_of(mesh))
        monkeypatch.setattr(module, "found", self._found)
        self.mail = SimpleNamespace(size=size, failed=lambda: frozenset(dead))
        self.serving = SimpleNamespace(
            mail=self.mail, layout=layout_of(mesh, range(size), LIMITS), limits=LIMITS, store=None, options=None,
            election=SimpleNamespace(follow=lambda: Term(0, claimant, "")),
            kernels=SimpleNamespace(total_bytes=lambda: None),
        )  # fmt: skip
        self.spares = SimpleNamespace(
            known=lambda: list(self.idle), is_idle=lambda rank: rank in self.idle, forget=self._forget
        )

    def on(self, rank):
        line = SimpleNamespace(rank=rank, size=self.mail.size, locations=self.locations)
        return Succession(self.serving, line, self.spares)

    def _forget(self, ranks):
        self.idle = [rank for rank in self.idle if rank not in ranks]

    def _found(self, line, candidates, wanted, decide, *, host=None):
        members = ([line.rank] if host else []) + list(candidates)
        decision = decide(members[:wanted])
        self.founded.append(decision)
        return View(2, decision.members, decision.plan)


LIMITS = ModelLimits(num_layers=4, grains=4)
GUESTS = SimpleNamespace(invite=lambda candidates, wanted: list(candidates)[: max(0, wanted)])


def decide(scene, plan, offers):
    states = {rank: State(1, records, (), free_bytes=ROOM).to_bytes() for rank, records in offers.items()}
    decision, latest = scene.on(min(offers)).decide(plan, states, GUESTS)
    return decision.members, Plan.from_bytes(decision.plan), latest.num_records


@pytest.mark.parametrize(
    ("before", "survivors", "idle", "members", "after"),
    [
        (Plan(0, 1, 4), [0, 2, 3], [], (0, 2, 3), (1, 3)),
        (Plan(0, 2, 1), [1], [], (1,), (1, 1)),
        (Plan(0, 1, 2), [1], [5, 6], (1, 5), (1, 2)),
        (Plan(0, 2, 2), [0, 1, 3], [6], (0, 1, 3, 6), (2, 2)),
    ],
)
def test_survivors_come_first_then_spare_ranks_up_to_the_old_size(monkeypatch, before, survivors, idle, members, after):
    scene = Scene(monkeypatch, Mesh(1, before.pp, before.tp), 8, idle=idle)
    found_members, plan, latest = decide(scene, before, {rank: 10 + rank for rank in survivors})
    assert (found_members, plan[1:], latest) == (members, after, 10 + max(survivors))
    assert not set(scene.idle) & set(members)


@pytest.mark.parametrize(
    ("nodes", "survivors", "members"),
    [
        ([0, 1, 1, 0, 1], [0, 1, 2, 4], (0, 1, 2, 4)),  # no order has a tp group more on one node
        ([0, 1, 1, 0, 1], [0, 1, 3, 4], (0, 3, 1, 4)),
    ],
)
def test_survivors_of_one_node_share_layers(monkeypatch, nodes, survivors, members):
    scene = Scene(monkeypatch, Mesh(1, 2, 2), 5, nodes=nodes)
    assert decide(scene, Plan(0, 2, 2), dict.fromkeys(survivors, 1))[:2] == (members, Plan(0, 2, 2))


def test_who_decides_leads_though_others_are_nearer(monkeypatch):
    scene = Scene(monkeypatch, Mesh(1, 2, 3), 6, nodes=[0, 1, 1, 1, 1, 1])
    assert decide(scene, Plan(0, 2, 3), dict.fromkeys(range(5), 1))[:2] == ((0, 1, 2, 3), Plan(0, 2, 2))


def test_survivors_are_not_left_out_for_the_sake_of_a_nearer_spare_rank(monkeypatch):
    scene = Scene(monkeypatch, Mesh(1, 2, 3), 6, nodes=[0, 1, 1, 1, 0, 0], idle=[4])
    members, plan, _ = decide(scene, Plan(0, 2, 3), dict.fromkeys(range(4), 1))
    assert (set(members), plan) == ({0, 1, 2, 3}, Plan(0, 2, 2))


def test_of_meshes_one_is_taken_that_has_room(monkeypatch):
    """With three ranks: three stages are the best here, since a grain of each layer needs too much."""
    scene = Scene(monkeypatch, Mesh(1, 1, 4), 4, bytes_of=lambda mesh: ROOM + 1 if mesh.tp > 1 else 1)
    assert decide(scene, Plan(0, 1, 4), {0: 1, 1: 1, 2: 1})[1] == Plan(0, 3, 1)


@pytest.mark.parametrize(
    ("rank", "dead", "idle", "claimant", "is_founder"),
    [
        (2, [0, 1], [2, 3], 0, True),  # the lowest of them
        (3, [0, 1], [2, 3], 0, False),
        (3, [0, 1], [2, 3], 3, True),  # the claimant, which answers no invitation
        (2, [0, 1], [2, 3], 3, False),
        (2, [0], [2, 3], 0, False),  # rank 1 may serve
        (3, [0, 1, 2], [3], 0, True),
    ],
)
def test_spare_ranks_that_are_alone_are_founded_by_one_of_them(monkeypatch, rank, dead, idle, claimant, is_founder):
    scene = Scene(monkeypatch, Mesh(1, 1, 2), 4, dead=dead, idle=idle, claimant=claimant)
    view = scene.on(rank).replace_all(View(1, ()))
    assert (view is not None) == is_founder == bool(scene.founded)
    if view is not None:
        assert view.members[0] == rank and Plan.from_bytes(view.plan).replica == 0


def test_a_lost_replica_is_founded_of_idle_ranks_on_the_mesh_that_they_can_fill(monkeypatch):
    scene = Scene(monkeypatch, Mesh(2, 1, 2), 6, dead=[2, 3], idle=[4])
    scene.on(0).replace(SimpleNamespace(replica=1))
    [decision] = scene.founded
    assert decision.members == (4,) and Plan.from_bytes(decision.plan) == Plan(1, 1, 1) and scene.idle == []


@pytest.mark.parametrize(
    ("members", "dead", "idle", "is_last"),
    [
        ([0], [1, 2, 3], [], True),
        ([0], [1, 2], [3], False),  # with rank 3 there are two
        ([0], [1, 3], [], False),  # rank 2 serves
        ([0, 1], [2], [3], True),  # no replica is larger than two ranks
    ],
)
def test_the_job_ends_only_when_nobody_could_go_on(monkeypatch, members, dead, idle, is_last):
    scene = Scene(monkeypatch, Mesh(2, 1, 2), 4, dead=dead, idle=idle)
    assert scene.on(0).is_last_hope(Plan(0, 1, len(members)), members) == is_last
