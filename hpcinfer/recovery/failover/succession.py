"""Who goes on after a death, and as what: the decisions of coordinators and claimants. No weights, no sequences."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from hpcinfer.comm.regroup import Decision, Guests, Offers, View, found
from hpcinfer.engine.replica import needed_bytes
from hpcinfer.partition.layout import smaller_meshes
from hpcinfer.partition.mesh import Mesh
from hpcinfer.partition.placement import place_ranks
from hpcinfer.recovery.dealing import Roster
from hpcinfer.recovery.failover.spares import Spares
from hpcinfer.recovery.failover.state import State
from hpcinfer.recovery.serve import Serving

if TYPE_CHECKING:
    from hpcinfer.comm.mpi import MpiGroup

log = logging.getLogger(__name__)


class Plan(NamedTuple):
    """What a replica is after it has regrouped."""

    replica: int
    pp: int
    tp: int

    @property
    def mesh(self) -> Mesh:
        """Of the replica."""
        return Mesh(1, self.pp, self.tp)

    def to_bytes(self) -> bytes:
        """Encode."""
        return json.dumps(self).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Plan:
        """Decode what `to_bytes` made."""
        return Plan(*json.loads(data))


class Succession:
    """Chooses members and meshes. One for each rank, which may have to decide."""

    def __init__(self, serving: Serving, line: MpiGroup | None, spares: Spares) -> None:
        self._serving, self._line, self._spares = serving, line, spares

    def decide(self, plan: Plan, offers: Offers, guests: Guests) -> tuple[Decision, State]:
        """Choose members and mesh of a replica that has lost ranks, and the state to go on from. On the coordinator.

        Survivors come first, then spare ranks, up to the size that the replica began with.
        """
        states = [State.from_bytes(offer) for offer in offers.values() if offer]
        size = self._size(plan.replica)
        self._spares.forget(offers)
        members = [*offers, *guests.invite(self._spares.known(), size - len(offers))]
        self._spares.forget(members)
        mesh = self._mesh(plan.mesh, min(size, len(members)), min(state.free_bytes for state in states))
        new = Plan(plan.replica, mesh.pp, mesh.tp)
        latest = max(states, key=lambda state: state.progress)
        return Decision(self._placed(members, mesh), new.to_bytes()), latest

    def replace(self, lost: Roster) -> None:
        """Have spare ranks found a replica anew none of whose ranks is left. On the claimant."""
        if self._line is None:
            return
        candidates, size = self._spares.known(), self._size(lost.replica)
        view = found(self._line, candidates, size, lambda members: self._founding(lost.replica, members))
        log.warning("replica %d is lost%s", lost.replica, "" if view is None else "; spare ranks take its place")
        if view is not None:
            self._spares.forget(view.members)

    def replace_all(self, own: View) -> View | None:
        """Found the first replica anew when only spare ranks are left: on the claimant, else on the lowest of them.

        Args:
            own: the last view of this rank, a spare one.
        """
        assert self._line is not None
        living = self._living()
        others = [rank for rank in living if rank != self._line.rank]
        if not all(map(self._spares.is_idle, others)):
            return None
        claimant = self._serving.election.follow().rank
        if self._line.rank != (claimant if claimant in living else living[0]):
            return None
        log.warning("all replicas are lost; spare ranks go on")
        return found(self._line, others, self._size(0), lambda members: self._founding(0, members), host=own)

    def is_last_hope(self, plan: Plan, members: Sequence[int]) -> bool:
        """Whether nobody can go on when these ranks cannot: all others are spare, and too few for a larger mesh."""
        living = self._living()
        best = smaller_meshes(plan.mesh, min(self._size(plan.replica), len(living)), self._serving.limits)[0]
        is_best = best.replica_size <= plan.mesh.replica_size
        return is_best and all(rank in members or self._spares.is_idle(rank) for rank in living)

    def _living(self) -> list[int]:
        mail = self._serving.mail
        return [rank for rank in range(mail.size) if rank not in mail.failed()]

    def _size(self, replica: int) -> int:
        return self._serving.layout.replicas[replica].mesh.replica_size

    def _mesh(self, before: Mesh, num_ranks: int, free_bytes: int) -> Mesh:
        """The best mesh that has room; the best of all if none has: then the replica will be given up."""
        serving = self._serving
        meshes = smaller_meshes(before, num_ranks, serving.limits)
        value_bytes = 4 if serving.kernels.total_bytes() is None else 2  # at most: on CPUs float32, on GPUs as stored
        fitting = [mesh for mesh in meshes
                   if needed_bytes(serving.store, mesh, serving.options, value_bytes) <= free_bytes]  # fmt: skip
        return (fitting or meshes)[0]

    def _founding(self, replica: int, members: Sequence[int]) -> Decision:
        """Choose the mesh of a replica of spare ranks."""
        before = self._serving.layout.replicas[replica].mesh
        mesh = smaller_meshes(before, len(members), self._serving.limits)[0]
        return Decision(self._placed(members, mesh), Plan(replica, mesh.pp, mesh.tp).to_bytes())

    def _placed(self, members: Sequence[int], mesh: Mesh) -> tuple[int, ...]:
        """The first ones that fill the mesh, tp groups inside nodes if who decides and leads stays the first."""
        members = members[: mesh.replica_size]
        if self._line is not None and self._line.locations is not None:
            order = place_ranks(mesh, [self._line.locations[rank] for rank in members])
            members = [members[index] for index in order] if order[0] == 0 else members
        return tuple(members)
