"""Ranks with a GPU each as threads."""

from collections.abc import Callable
from queue import Empty
from threading import BrokenBarrierError
from typing import Any
from unittest.mock import patch

import numpy as np
import thread_group
from fake_gpu import AwareGroup, FakeGpu, FakeNccl

from hpcinfer.comm.device.group import DeviceGroup
from hpcinfer.comm.device.nccl_group import NcclGroup
from hpcinfer.comm.device.staged_group import StagedGroup

KINDS = ("pinned", "direct", "nccl")
_LIMIT_S = 5  # a thread waits no longer for the others


def group_of(kind: str, group: Any, gpu: FakeGpu) -> DeviceGroup:
    """Make a group of GPUs over one of threads."""
    staged = StagedGroup(AwareGroup(group), gpu, is_direct=True) if kind == "direct" else StagedGroup(group, gpu)
    if kind != "nccl":
        return staged
    return NcclGroup(group, gpu, FakeNccl(group).join(group.size, group.rank, b"the id"), staged)


def on_gpus(kind: str, size: int, work: Callable[[Any, FakeGpu], Any]) -> list[Any]:
    """Call `work(group, gpu)` on every rank; gives what each returned, by rank, and raises what one raised."""

    def main(group: Any) -> Any:
        gpu = FakeGpu(f"GPU {group.rank}")
        return work(group_of(kind, group, gpu), gpu)

    with patch.object(thread_group, "_LIMIT_S", _LIMIT_S):
        results = thread_group.run_ranks(size, main)
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors:  # that a message did not come says less than why it was not sent
        raise min(errors, key=lambda error: isinstance(error, Empty | BrokenBarrierError))
    return results


def part(rank: int, count: int, salt: int = 0) -> np.ndarray:
    """Numbers that say who made them."""
    return np.random.default_rng([rank, count, salt]).standard_normal(count).astype("f4")
