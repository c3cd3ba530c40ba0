"""The order of work and its blocks: a function of the input alone, never of ranks or time."""

from typing import NamedTuple

import numpy as np

MAX_BLOCK_ROWS = 256
MIN_BLOCK_ROWS = 8  # of large inputs; small ones go down to single rows
_SHARES = (16, 4096)  # a block is at most this part of what is left, for small and for large inputs


class WorkOrder(NamedTuple):
    """Block b is the rows order[block_starts[b]:block_starts[b + 1]]."""

    order: np.ndarray  # uint32 (uint64 from 4 G rows): all rows
    block_starts: np.ndarray  # uint64: one more than there are blocks


class _Stream(NamedTuple):
    """Rows in order, and where a cut splits nothing that belongs together."""

    rows: np.ndarray
    group_starts: np.ndarray | None  # None: cut anywhere


def work_order(prefixes: np.ndarray, costs: np.ndarray) -> WorkOrder:
    """Put rows with a common prefix together, largest groups first, the others by expected work, interleaved.

    Not collective. Needs about 40 bytes per row for a moment.

    Args:
        prefixes: hash of each prompt's beginning, 0 for none.
        costs: expected work of each row.
    """
    row_type = np.uint32 if len(costs) < 2**32 else np.uint64
    grouped = _grouped_rows(prefixes, row_type)
    is_single = np.ones(len(costs), bool)
    is_single[grouped.rows] = False
    single_rows = np.flatnonzero(is_single).astype(row_type)
    single_rows = single_rows[np.argsort(~costs[single_rows], kind="stable")]  # descending, ties by row
    return _interleave(grouped, _Stream(single_rows, None), len(costs))


def _grouped_rows(prefixes: np.ndarray, row_type: type) -> _Stream:
    rows: np.ndarray = np.flatnonzero(prefixes).astype(row_type)
    rows = rows[np.argsort(prefixes[rows], kind="stable")]  # by prefix, ties by row
    ordered = prefixes[rows]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1]))[:len(rows)])
    sizes = np.diff(starts, append=len(rows))
    starts, sizes = starts[sizes >= 2], sizes[sizes >= 2]
    by_size = np.lexsort((rows[starts], -sizes))  # largest first, ties by first row
    starts, sizes = starts[by_size], sizes[by_size]
    group_starts = np.cumsum(sizes) - sizes
    picks = np.repeat(starts - group_starts, sizes) + np.arange(sizes.sum())
    return _Stream(rows[picks], group_starts)


def _interleave(grouped: _Stream, single: _Stream, num_rows: int) -> WorkOrder:
    """Cut both streams into blocks; the stream of which more is left gives the next one."""
    order, starts, done = np.empty(num_rows, single.rows.dtype), [0], 0
    streams = [stream for stream in (grouped, single) if len(stream.rows)]
    taken = [0] * len(streams)
    while done < num_rows:
        which = max(range(len(streams)), key=lambda i: 1 - taken[i] / len(streams[i].rows))
        start = taken[which]
        stop = _cut(streams[which], start, start + _block_rows(num_rows, num_rows - done))
        order[done:done + stop - start] = streams[which].rows[start:stop]
        taken[which] = stop
        done += stop - start
        starts.append(done)
    return WorkOrder(order, np.array(starts, np.uint64))


def _block_rows(num_rows: int, num_left: int) -> int:
    """Guided self-scheduling with a share that grows with the input: large blocks first, small ones at the end."""
    shares = min(max(num_rows // MAX_BLOCK_ROWS, _SHARES[0]), _SHARES[1])
    smallest = min(max(num_rows // 1024, 1), MIN_BLOCK_ROWS)
    return min(max(num_left // shares, smallest), MAX_BLOCK_ROWS)


def _cut(stream: _Stream, start: int, stop: int) -> int:
    """End a block before a group that does not fit any more, unless the group is all the block has."""
    stop = min(stop, len(stream.rows))
    if stream.group_starts is None or stop == len(stream.rows):
        return stop
    boundary = int(stream.group_starts[np.searchsorted(stream.group_starts, stop, side="right") - 1])
    return boundary if boundary > start else stop
