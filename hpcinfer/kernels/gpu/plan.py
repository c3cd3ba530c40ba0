"""What attention over one batch needs as integers: heads in groups that share K and V, tokens and splits in items.

Shape letters: N query heads, C heads of a program, I items.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpcinfer.kernels.protocol import HeadLayout, StepInput

ROWS = 64  # of a program that multiplies on tensor cores
PLAIN_ROWS = 16  # of one that does not
TILE = 64  # keys
SPLIT = 4  # tiles: a decoding sequence of 2,048 keys and 8 KV heads has 64 programs, to fill half of an H100


class HeadGroups(NamedTuple):
    """Query heads of each program: some that share a KV head. On the device."""

    columns: Tensor  # int32 [groups, C]: first column of each head; -1 where there is none
    kv_heads: Tensor  # int32 [groups]
    head_columns: Tensor  # int32 [N]: of all heads
    num_columns: int  # of all grains
    is_padded: bool  # whether some columns belong to no head

    @property
    def size(self) -> int:
        """C."""
        return self.columns.shape[1]


class PlanKey(NamedTuple):
    """What attention over a batch is planned for."""

    group_size: int  # heads of a program
    window: int  # keys that a token sees; 0 is all
    rows: int  # of a program


class Plan(NamedTuple):
    """The integers of attention over one batch: the same for all layers with one window. On the device."""

    items: Tensor  # int32 [I, 7]: see `_attention_kernel`
    merged: Tensor  # int32 [*, 4]: see `_merge_kernel`
    num_partial: int  # rows, for each group, of parts that are merged afterwards
    rows: int  # of a program


def group_heads(layout: HeadLayout, device: torch.device) -> HeadGroups:
    """Group the heads of a rank by their KV head."""
    columns = layout.heads_per_grain * layout.head_size
    firsts = [grain * columns + i * layout.head_size for grain, count in enumerate(layout.grain_heads)
              for i in range(count)]  # fmt: skip
    groups: list[tuple[int, list[int]]] = []
    for kv_head in sorted(set(layout.kv_of_head)):
        mine = [first for first, kv in zip(firsts, layout.kv_of_head, strict=True) if kv == kv_head]
        groups += [(kv_head, mine[start : start + PLAIN_ROWS]) for start in range(0, len(mine), PLAIN_ROWS)]
    table = np.full((len(groups), max((len(heads) for _, heads in groups), default=1)), -1, np.int32)
    for row, (_, heads) in zip(table, groups, strict=True):
        row[: len(heads)] = heads
    num_columns = len(layout.grain_heads) * columns
    places = (table, np.array([kv_head for kv_head, _ in groups], np.int32), np.array(firsts, np.int32))
    tables, kv_heads, head_columns = (torch.from_numpy(each).to(device) for each in places)
    return HeadGroups(tables, kv_heads, head_columns, num_columns, len(firsts) * layout.head_size < num_columns)


class Items(NamedTuple):
    """A plan, on the host."""

    items: np.ndarray  # int32 [I, 7]
    merged: np.ndarray  # int32 [*, 4]
    num_partial: int  # rows


def plan_items(step: StepInput, key: PlanKey) -> Items:
    """Cut a batch into items of one program (per group of heads) each; see `Plan`.

    A sequence that has one tile of queries, or queries at one position only, gets an item per split; otherwise a
    program walks them.
    """
    group_size, window = key.group_size, key.window
    tokens = key.rows // group_size
    lengths = np.diff(step.query_starts)
    num_tiles = -(-lengths // tokens)
    sequences = np.repeat(np.arange(len(lengths)), num_tiles)
    within = tokens * (np.arange(len(sequences)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles))
    counts = np.minimum(tokens, lengths[sequences] - within)
    queries = step.query_starts[sequences] + within
    positions = step.positions[queries]
    first = np.maximum(positions - window + 1, 0) // TILE if window else np.zeros_like(positions)
    stop = step.positions[queries + counts - 1] // TILE + 1
    num_splits = -(-stop // SPLIT) - first // SPLIT
    is_decoded = step.positions[step.query_starts[:-1]] == step.positions[step.query_starts[1:] - 1]
    is_split = ((num_tiles == 1) | is_decoded)[sequences] & (num_splits > 1)
    num_items, num_rows = np.where(is_split, num_splits, 1), counts * group_size
    places = np.cumsum(np.where(is_split, num_splits * num_rows, 0))
    starts = places - np.where(is_split, num_splits * num_rows, 0)

    each = np.repeat(np.arange(len(sequences)), num_items)
    part = np.arange(len(each)) - np.repeat(np.cumsum(num_items) - num_items, num_items)
    split = (first[each] // SPLIT + part) * SPLIT
    cut = is_split[each]
    items = np.stack([
        queries[each], counts[each], step.table_starts[sequences[each]],
        step.context_lens[sequences[each]], np.where(cut, np.maximum(first[each], split), first[each]),
        np.where(cut, np.minimum(stop[each], split + SPLIT), stop[each]),
        np.where(cut, starts[each] + part * num_rows[each], -1),
    ], axis=1)  # fmt: skip
    longest = np.argsort(items[:, 4] - items[:, 5], kind="stable")  # first, so that none is left alone at the end
    merged = np.stack([queries, counts, starts, num_splits], axis=1)[is_split]
    return Items(items[longest].astype(np.int32), merged.astype(np.int32), int(places[-1]) if len(places) else 0)
