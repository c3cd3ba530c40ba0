"""Timing works of all ranks: in loops of calls, in turn, for sizes as long as there is time."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from hpcinfer.comm.protocol import Collectives
from hpcinfer.comm.selector import Point

PATIENCE = 2.0  # the largest sizes are left out where the time has gone over by this factor
_ROUNDS, _MAX_CALLS = 3, 300
_HOPELESS = 3.0  # a work that is slower than the best one by this factor is left out of larger sizes
_LARGE = 1 << 18  # bytes: below that it may still be the best one of those

Work = Callable[[], None]


def curves_of(
    group: Collectives, works_of: Callable[[int], dict[str, Work]], timed: Callable[..., dict[str, float]],
    budget_s: float, sizes: Sequence[int],
) -> dict[str, list[Point]]:  # fmt: skip
    """Time works for each size; those that have no hope any more are left out.

    Collective over the group.

    Args:
        group: all ranks call this.
        works_of: makes works for a number of bytes, by name.
        timed: times them, as `time_in_turn`.
        budget_s: about how long all may take.
        sizes: bytes, ascending.
    """
    curves: dict[str, list[Point]] = {}
    hopeless: set[str] = set()
    end = time.monotonic() + PATIENCE * budget_s
    for size in sizes:
        works = {name: work for name, work in works_of(size).items() if name not in hopeless}
        seconds = timed(group, works, budget_s / len(sizes))
        for name, value in seconds.items():
            curves.setdefault(name, []).append(Point(size, value))
        best = min(seconds.values())
        if size >= _LARGE:
            hopeless |= {name for name in works if seconds[name] >= _HOPELESS * best}
        if is_said(group, time.monotonic() > end):
            break
    return curves


def time_in_turn(
    group: Collectives, works: Mapping[str, Work], budget_s: float, settle: Work = lambda: None
) -> dict[str, float]:
    """Time calls of several works in loops, in turn, so that a busy moment of the machine meets all of them.

    Collective over the group.

    Args:
        group: all ranks call this.
        works: by name.
        budget_s: about how long it may take.
        settle: waits until what was called is done, where calls only enqueue.

    Returns:
        Seconds of a call, of the slowest rank: medians of a few rounds.
    """
    for work in works.values():
        work()
    first = {name: loop_time(group, work, 1, settle) for name, work in works.items()}
    share = budget_s / len(works) / (_ROUNDS + 2)
    calls = {name: max(1, min(_MAX_CALLS, int(share / value))) for name, value in first.items()}
    rounds = [{name: loop_time(group, work, calls[name], settle) for name, work in works.items()}
              for _ in range(_ROUNDS)]  # fmt: skip
    return {name: statistics.median(each[name] for each in rounds) for name in works}


def loop_time(group: Collectives, work: Work, calls: int, settle: Work) -> float:
    """Seconds of a call in a loop of some, on the slowest rank: the same number on all. Collective over the group."""
    settle()
    group.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        work()
    settle()
    return max(map(float, group.all_gather_bytes(repr((time.perf_counter() - start) / calls).encode())))


def is_said(group: Collectives, value: bool) -> bool:
    """What the first rank says. Collective over the group."""
    return group.broadcast_bytes(bytes([value]) if group.rank == 0 else None)[0] == 1
