"""The ranks of a replica: who exchanges bytes with whom, and arrays, which may be in the memory of GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from hpcinfer.comm.device.opening import open_device_group
from hpcinfer.comm.node.opening import open_channel
from hpcinfer.comm.operations import Operations
from hpcinfer.comm.selector import Selector
from hpcinfer.comm.tree import TreeReducer
from hpcinfer.comm.waiting import turn_meanwhile
from hpcinfer.kernels.protocol import Kernels
from hpcinfer.partition.grains import grain_runs, subtrees
from hpcinfer.partition.mesh import Mesh

if TYPE_CHECKING:
    from hpcinfer.comm.device.arrays import DeviceArrays
    from hpcinfer.comm.device.group import DeviceGroup
    from hpcinfer.comm.protocol import Collectives

_PADDING = 32  # tokens that kernels may add to a batch, so that it is one that they have recorded


@dataclass(frozen=True)
class Groups:
    """The groups of one rank."""

    reducer: TreeReducer
    stage: Operations  # the ranks of this one's stage
    replica: Operations  # all ranks
    stage_arrays: DeviceGroup | None = None  # the same for arrays, where they are in the memory of GPUs
    replica_arrays: DeviceGroup | None = None

    def close(self) -> None:
        """Let go of messages and of shared memory: it is over for this rank, as after a death. Not collective."""
        self.reducer.close()
        for each in (self.stage, self.replica):
            each.close()
        self.close_arrays()

    def close_arrays(self) -> None:
        """Let go of what GPUs talk through: they are done, or a rank has died. Not collective."""
        for each in (self.stage_arrays, self.replica_arrays):
            if each is not None:
                each.close()

    def check(self) -> None:
        """Look whether all ranks that this one waits for live. Not collective.

        Raises:
            RankFailedError: one does not.
        """
        turn_meanwhile()
        for each in (self.stage_arrays, self.replica_arrays):
            if each is not None:
                each.check()


def open_groups(
    replica: Collectives, mesh: Mesh, grains: int, kernels: Kernels, selector: Selector, hidden_shape: tuple[int, int]
) -> Groups:
    """Make the groups of a replica.

    Collective over the replica.

    Args:
        replica: its ranks, stage by stage, tp innermost.
        mesh: of the replica.
        grains: leaves of the tree of sums.
        kernels: whose arrays are exchanged.
        selector: of forms and ways; the same on all ranks.
        hidden_shape: tokens of a batch, at most, and the size of hidden states.
    """
    tp_group, arrays = replica.split(mesh.coord(replica.rank).pp, replica.rank), kernels.device_arrays()
    if arrays is not None:
        return _open_device_groups(replica, tp_group, mesh, grains, kernels, arrays, selector, hidden_shape)
    room_bytes = 4 * prod(hidden_shape) * max(len(subtrees(run)) for run in grain_runs(grains, mesh.tp))
    reducer = TreeReducer(tp_group, grains, kernels.empty, selector, room_bytes)
    channel = reducer.channel if mesh.pp == 1 else open_channel(replica, is_for_messages=True)
    return Groups(reducer, Operations(tp_group, reducer.channel, selector), Operations(replica, channel, selector))


def _open_device_groups(
    replica: Collectives, tp_group: Collectives, mesh: Mesh, grains: int, kernels: Kernels, arrays: DeviceArrays,
    selector: Selector, hidden_shape: tuple[int, int],
) -> Groups:  # fmt: skip
    most_elements = (hidden_shape[0] + _PADDING) * hidden_shape[1]
    sums = open_device_group(tp_group, arrays)
    try:
        reducer = TreeReducer(sums, grains, kernels.empty, selector, arrays=arrays, most_elements=most_elements,
                              exact=kernels.is_reproducible)  # fmt: skip
        stages = sums if mesh.pp == 1 else open_device_group(replica, arrays)
    except BaseException:
        sums.close()
        raise
    return Groups(reducer, Operations(tp_group), Operations(replica), sums, stages)
