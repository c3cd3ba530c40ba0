"""Ranks of a node as threads, each with a channel over the same memory."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from thread_group import run_ranks

from hpcinfer.comm.node.channel import NodeChannel
from hpcinfer.comm.node.library import load
from hpcinfer.partition.grains import Span, grain_runs, subtrees, tree_reduce
from hpcinfer.partition.tree_program import TreeProgram, tree_program

SMALL_SLOT = 1 << 14  # so that little data goes in many pieces


def on_channel(size: int, work: Callable[[NodeChannel], Any], room_bytes: int = 0, slot_bytes: int = SMALL_SLOT) -> Any:
    """Call `work(channel)` on every rank; gives what each returned, by rank, and raises what one raised."""
    if load() is None:
        pytest.skip("the node library was not built")

    def main(group: Any) -> Any:
        channel = NodeChannel.open(group, range(size), room_bytes, slot_bytes=slot_bytes)
        assert channel is not None
        assert (channel.rank, channel.size) == (group.rank, size)
        return work(channel)

    results = run_ranks(size, main)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


class Sum:
    """Grains of which every rank holds its nodes, and what their sum is."""

    def __init__(self, size: int, count: int, *, grains: int = 8, seed: int = 0) -> None:
        random = np.random.default_rng([seed, count])
        scales = 10.0 ** random.integers(-6, 7, (grains, count))
        values = (random.standard_normal((grains, count)) * scales).astype("f4")
        values[:, ::7] = -0.0
        leaves = {Span(grain, grain + 1): value for grain, value in enumerate(values)}
        self.spans = [subtrees(run) for run in grain_runs(grains, size)]
        self.program: TreeProgram = tree_program(self.spans)
        self.nodes = [[tree_reduce(leaves, span, np.add) for span in rank] for rank in self.spans]
        self.total = tree_reduce(leaves, Span(0, grains), np.add)
