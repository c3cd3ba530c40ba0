"""Measuring sums of GPUs: through NCCL and through the MPI, in all forms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from hpcinfer.comm.device.arrays import DeviceArrays
from hpcinfer.comm.device.group import DeviceGroup
from hpcinfer.comm.device.library_sum import LibrarySum
from hpcinfer.comm.device.nccl_group import NcclGroup
from hpcinfer.comm.device.opening import open_device_group
from hpcinfer.comm.forms import FORMS, AllReduce, forms_for
from hpcinfer.comm.protocol import Collectives
from hpcinfer.comm.selector import ALL_REDUCE, LIBRARY, Point
from hpcinfer.comm.timing import Work, curves_of, time_in_turn
from hpcinfer.partition.grains import grain_runs, subtrees


def measure_on_gpus(
    group: Collectives, arrays: DeviceArrays, budget_s: float, sizes: Sequence[int], grains: int
) -> dict[str, dict[str, list[Point]]]:
    """Measure sums of GPUs in all forms, through NCCL where it can be had, and through the MPI.

    Collective over the group.

    Args:
        group: of the MPI.
        arrays: of this rank's GPU.
        budget_s: about how long it may take.
        sizes: bytes of a sum.
        grains: leaves of the tree.

    Returns:
        Seconds by operation, by transport and form, the same on all ranks.
    """
    opened = open_device_group(group, arrays)
    reduces = _forms_on_gpus(opened, arrays, grains)

    def works_of(size: int) -> dict[str, Work]:
        return {name: _call_on_gpu(reduce, arrays, size // 4) for name, reduce in reduces.items()}

    timed = partial(time_in_turn, settle=lambda: arrays.wait(opened.check))
    found = {ALL_REDUCE: curves_of(group, works_of, timed, budget_s, sizes)}
    opened.close()
    return found


def _forms_on_gpus(
    group: DeviceGroup, arrays: DeviceArrays, grains: int
) -> dict[str, AllReduce | LibrarySum]:
    spans = [subtrees(run) for run in grain_runs(grains, group.size)]
    reduces: dict[str, AllReduce | LibrarySum] = {
        f"{transport}:{name}": AllReduce(each, spans, FORMS[name], arrays=arrays)
        for transport, each in group.transports.items() for name in forms_for(group.locations)}  # fmt: skip
    if isinstance(group, NcclGroup):
        reduces[LIBRARY] = LibrarySum(group, spans[group.rank], arrays)
    return reduces


def _call_on_gpu(reduce: AllReduce | LibrarySum, arrays: DeviceArrays, length: int) -> Work:
    room, out = reduce.room(length), arrays.empty(length)
    nodes = [room[start : start + length] for start in range(0, len(room), length)]

    def work() -> None:
        if (end := reduce.start(nodes, out)) is not None:
            end()

    return work
