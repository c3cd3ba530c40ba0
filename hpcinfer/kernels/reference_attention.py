"""Attention over the paged cache: keys in tiles of 64 absolute positions, an online softmax in one order per row.

A row is one token with one query head. It meets exactly the tiles that hold a key it may see, in ascending order: a
function of its position and window alone. Rows of one sequence and KV head share products in units of 16 rows;
what the other rows of a unit are, or that some are zeros, changes no bit (see reference_products).

Shape letters: R rows, A rows that meet a tile, U units, H head size, E head size padded to a multiple of 16.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpcinfer.kernels.protocol import HeadLayout, StepInput
from hpcinfer.kernels.reference_math import exp_, tree_sum_
from hpcinfer.kernels.reference_products import ROWS, batched_product, batches_are_alike
from hpcinfer.partition.split import align_up

TILE = 64  # keys of a tile


class KeyTile(NamedTuple):
    """What happens at one tile of keys, for all rows that meet it."""

    rows: Tensor  # [A] into the rows
    units: Tensor  # [B] units in the batch; filled to a multiple of ROWS with the zero unit
    places: Tensor  # [A] of those rows in the batch's rows, B * ROWS of them
    keys: Tensor  # [B * TILE] rows of the cache, a row being (slot, KV head); the zero row where there is no key
    hidden: Tensor | None  # bool [A, TILE]: keys that a row must not see; None if it sees all


@dataclass(frozen=True)
class AttentionPlan:
    """The integers of attention over one batch; the same for all layers with one window."""

    queries: Tensor  # [R] rows as (token, head) of q
    places: Tensor  # [R] rows in the units
    outputs: Tensor  # [R] rows as (token, grain, head of grain) of the result
    num_units: int
    tiles: tuple[KeyTile, ...]


class _Rows(NamedTuple):
    """Rows sorted by sequence, KV head, token, head; all arrays by row."""

    order: np.ndarray  # token * N + head
    places: np.ndarray  # unit * ROWS + row of the unit
    positions: np.ndarray
    first_tiles: np.ndarray
    last_tiles: np.ndarray


class _Units(NamedTuple):
    """Units of up to ROWS rows of one sequence and KV head; arrays by unit."""

    sequences: np.ndarray
    kv_heads: np.ndarray
    first_tiles: np.ndarray  # tiles that any of its rows meets: [first, last]
    last_tiles: np.ndarray


def plan_attention(step: StepInput, layout: HeadLayout, window: int, cache_shape: tuple[int, ...]) -> AttentionPlan:
    """Lay out one batch for attention over a cache [2, B + 1, P, K, H] whose last block is zeros."""
    _, num_blocks, block_size, num_kv_heads, _ = cache_shape
    zero_slot = (num_blocks - 1) * block_size
    rows, units = _sort_rows(step, np.asarray(layout.kv_of_head, np.int64), num_kv_heads, window)
    slots, tile_starts = _tile_slots(step, block_size, zero_slot)
    tiles = []
    for tile in range(int(rows.first_tiles.min()), int(rows.last_tiles.max()) + 1):
        active = np.flatnonzero((units.first_tiles <= tile) & (tile <= units.last_tiles))
        keys = np.full((align_up(len(active), ROWS), TILE), zero_slot * num_kv_heads)
        tile_slots = slots[tile_starts[units.sequences[active]] + tile]
        keys[: len(active)] = tile_slots * num_kv_heads + units.kv_heads[active, None]
        tiles.append(_key_tile(tile, rows, active, keys, window))
    heads = np.array(
        [grain * layout.heads_per_grain + i for grain, count in enumerate(layout.grain_heads) for i in range(count)]
    )
    tokens, head = np.divmod(rows.order, len(layout.kv_of_head))
    outputs = tokens * (len(layout.grain_heads) * layout.heads_per_grain) + heads[head]
    queries, places, targets = map(torch.from_numpy, (rows.order, rows.places, outputs))
    return AttentionPlan(queries, places, targets, len(units.sequences), tuple(tiles))


def _sort_rows(step: StepInput, kv_of_head: np.ndarray, num_kv_heads: int, window: int) -> tuple[_Rows, _Units]:
    lengths = np.diff(step.query_starts)
    sequences = np.repeat(np.arange(len(lengths)), lengths)
    groups = (sequences[:, None] * num_kv_heads + kv_of_head).ravel()
    order = np.argsort(groups, kind="stable")
    groups = groups[order]
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    counts = np.diff(starts, append=len(groups))
    num_units = -(-counts // ROWS)
    within = np.arange(len(groups)) - np.repeat(starts, counts)
    places = np.repeat((np.cumsum(num_units) - num_units) * ROWS, counts) + within
    positions = step.positions[order // len(kv_of_head)]
    first_tiles = np.maximum(positions - window + 1, 0) // TILE if window else np.zeros_like(positions)
    rows = _Rows(order, places, positions, first_tiles, positions // TILE)
    unit_starts = np.flatnonzero(within % ROWS == 0)
    unit_groups = np.repeat(groups[starts], num_units)
    units = _Units(
        unit_groups // num_kv_heads, unit_groups % num_kv_heads,
        np.minimum.reduceat(first_tiles, unit_starts), np.maximum.reduceat(rows.last_tiles, unit_starts),
    )  # fmt: skip
    return rows, units


def _tile_slots(step: StepInput, block_size: int, zero_slot: int) -> tuple[np.ndarray, np.ndarray]:
    """Slots of all keys, tile by tile and sequence by sequence: ([tiles, TILE], first tile of each sequence)."""
    num_tiles = -(-step.context_lens // TILE)
    tile_starts = np.cumsum(num_tiles) - num_tiles
    table_starts = step.table_starts[:-1]
    tile_of_sequence = np.arange(int(num_tiles.sum())) - np.repeat(tile_starts, num_tiles)
    positions = tile_of_sequence[:, None] * TILE + np.arange(TILE)
    is_key = positions < np.repeat(step.context_lens, num_tiles)[:, None]
    entries = np.where(is_key, np.repeat(table_starts, num_tiles)[:, None] + positions // block_size, 0)
    slots = step.block_tables[entries] * block_size + positions % block_size
    return np.where(is_key, slots, zero_slot), tile_starts


def _key_tile(tile: int, rows: _Rows, active: np.ndarray, keys: np.ndarray, window: int) -> KeyTile:
    num_units = int(rows.places[-1]) // ROWS + 1
    units = np.full(len(keys), num_units)
    units[: len(active)] = active
    batch_unit = np.zeros(num_units, np.int64)
    batch_unit[active] = np.arange(len(active))
    meets = np.flatnonzero((rows.first_tiles <= tile) & (tile <= rows.last_tiles))
    unit, row = np.divmod(rows.places[meets], ROWS)
    age = rows.positions[meets, None] - (tile * TILE + np.arange(TILE))
    hidden = (age < 0) | (age >= window) if window else age < 0
    places = batch_unit[unit] * ROWS + row
    indices = [torch.from_numpy(index) for index in (meets, units, places, keys.reshape(-1))]
    return KeyTile(indices[0], indices[1], indices[2], indices[3], torch.from_numpy(hidden) if hidden.any() else None)


def attend(q: Tensor, cache: Tensor, plan: AttentionPlan, num_outputs: int) -> Tensor:
    """Attention of all rows of a batch.

    Args:
        q: rotated queries [T, N, H], contiguous.
        cache: K and V [2, B + 1, P, K, H]; the last block is zeros.
        plan: of this batch, window and cache.
        num_outputs: heads of the result, T * G * heads of a grain.

    Returns:
        [num_outputs, H]; zeros where there is no head.
    """
    head_size = q.shape[-1]
    padded_size = align_up(head_size, ROWS)
    units = torch.zeros((plan.num_units + 1) * ROWS, padded_size)
    units[plan.places, :head_size] = q.view(-1, head_size).index_select(0, plan.queries).mul_(head_size**-0.5)
    softmax = OnlineSoftmax(len(plan.queries), head_size)
    keys, values = cache.view(2, -1, head_size)
    for tile in plan.tiles:
        softmax.add_tile(units.view(-1, ROWS, padded_size), keys, values, tile)
    result = torch.zeros(num_outputs, head_size)
    result[plan.outputs] = softmax.finish()
    return result


class OnlineSoftmax:
    """Running maximum, denominator and weighted values of each row. Source: Milakov, Gimelshein, arXiv:1805.02867."""

    def __init__(self, num_rows: int, head_size: int) -> None:
        self.maximum = torch.full((num_rows,), -torch.inf)
        self.denominator = torch.zeros(num_rows)
        self.weighted = torch.zeros(num_rows, head_size)

    def add_tile(self, units: Tensor, keys: Tensor, values: Tensor, tile: KeyTile) -> None:
        """Take one tile of keys into the rows that meet it; the others are not touched."""
        head_size, padded_size = self.weighted.shape[1], units.shape[2]
        tile_keys, tile_values = (_gather(cache, tile.keys, padded_size) for cache in (keys, values))
        is_tiled = batches_are_alike(padded_size, TILE) and batches_are_alike(TILE, padded_size)
        scores = batched_product(units[tile.units], tile_keys.transpose(1, 2), is_tiled=is_tiled)
        scores = scores.view(-1, TILE).index_select(0, tile.places)
        if tile.hidden is not None:
            scores.masked_fill_(tile.hidden, -torch.inf)
        old = self.maximum[tile.rows]
        maximum = torch.maximum(old, scores.amax(1))
        weights = exp_(scores.sub_(maximum.unsqueeze(1)))
        batch = torch.zeros(len(tile.units) * ROWS, TILE)
        batch[tile.places] = weights
        products = batched_product(batch.view(-1, ROWS, TILE), tile_values, is_tiled=is_tiled)
        added = products.view(-1, padded_size).index_select(0, tile.places)[:, :head_size]
        decay = exp_(old - maximum)
        self.maximum[tile.rows] = maximum
        self.denominator[tile.rows] = self.denominator[tile.rows].mul_(decay).add_(tree_sum_(weights))
        self.weighted[tile.rows] = self.weighted[tile.rows].mul_(decay.unsqueeze(1)).add_(added)

    def finish(self) -> Tensor:
        """Weighted means, [R, H]. Adding 0 makes -0 the same as 0: the sign of a zero could tell of unseen keys."""
        return self.weighted.add_(0.0).div_(self.denominator.unsqueeze(1))


def _gather(cache: Tensor, keys: Tensor, padded_size: int) -> Tensor:
    rows = cache.index_select(0, keys).float()
    if rows.shape[1] < padded_size:
        rows = torch.nn.functional.pad(rows, (0, padded_size - rows.shape[1]))
    return rows.view(-1, TILE, padded_size)
