"""Paged attention: prefill and decode of a mixed batch in one launch, keys in tiles of 64 absolute positions.

A row is one token with one query head; rows of a program are some tokens of a sequence with the query heads of one KV
head, so that K and V are loaded once for all of them. A row meets its keys in ascending order, tile by tile with an
online softmax (Source: Milakov, Gimelshein, arXiv:1805.02867) in splits of 4 tiles at fixed absolute positions; what a
split has is then merged into what those before it have. Whether one program walks through the splits or each has a
program of its own changes no bit: a tile or split without a key of the row leaves it as it was, exactly.

Shape letters: T tokens, N query heads, K KV heads, H head size, I items, C heads of a program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from hpcinfer.kernels.gpu.codes import KINDS, from_e4m3, loadable
from hpcinfer.kernels.gpu.plan import PLAIN_ROWS, ROWS, SPLIT, TILE, HeadGroups, Plan
from hpcinfer.kernels.gpu.rows import EXACT, KvCache
from hpcinfer.kernels.gpu.step import Places


def attend(
    q: Tensor, places: Places, cache: KvCache, groups: HeadGroups, plan: Plan, window: int, dtype: torch.dtype
) -> Tensor:
    """Causal attention of q [T, columns] over the cache: [T, columns] in `dtype`, zeros where there is no head."""
    out = (torch.zeros if groups.is_padded else torch.empty)(q.shape, dtype=dtype, device=q.device)
    num_groups, size, has_scales = len(groups.kv_heads), cache.keys.shape[2], cache.key_scales is not None
    if not len(plan.items) or not num_groups:
        return out
    partial = torch.empty(plan.num_partial, num_groups, size + 4, device=q.device)
    shape = {"GROUP": groups.size, "COLUMNS": groups.num_columns, "H": size, "ROWS": plan.rows,
             "BLOCK": max(16, triton.next_power_of_2(size)), "NUM_GROUPS": num_groups}  # fmt: skip
    _attention_kernel[len(plan.items), num_groups](
        q, loadable(cache.keys), loadable(cache.values), cache.key_scales, cache.value_scales, plan.items,
        places.positions, places.block_tables, groups.columns, groups.kv_heads, out, partial,
        size**-0.5 * 1.44269504088896341, window, **shape, K=cache.keys.shape[1],
        BLOCK_SIZE=cache.block_size, HAS_WINDOW=window > 0, HAS_SCALES=has_scales,
        IS_WIDE=_is_wide(q.dtype, cache), TILE=TILE, SPLIT=SPLIT, num_warps=8 if size > 128 or has_scales else 4,
        num_stages=2,
        **EXACT,
    )  # fmt: skip
    if len(plan.merged):
        _merge_kernel[len(plan.merged), num_groups](
            partial, plan.merged, groups.columns, out, **shape, num_warps=8, **EXACT
        )
    return out


def rows_of_program(dtype: torch.dtype, cache: KvCache) -> int:
    """Rows of a program, by the type of q; float32 would need too many registers for more."""
    return PLAIN_ROWS if _operands(dtype, cache) == torch.float32 else ROWS


def _operands(dtype: torch.dtype, cache: KvCache) -> torch.dtype:
    """What is multiplied: float32, if q and the cache are not of one type; codes take any."""
    return dtype if cache.keys.dtype in (dtype, *KINDS) else torch.float32


def _is_wide(dtype: torch.dtype, cache: KvCache) -> bool:
    """Whether what is loaded is widened to float32; the interpreter takes the bits of bfloat16 for integers."""
    is_interpreted = dtype == torch.bfloat16 and bool(triton.knobs.runtime.interpret)
    return is_interpreted or _operands(dtype, cache) == torch.float32


@triton.jit
def _decay(old: tensor, new: tensor) -> tensor:
    """2 ** (old - new); 0 where old is -inf, also where new is."""
    return tl.where(old == float("-inf"), 0.0, tl.exp2(old - tl.where(new == float("-inf"), 0.0, new)))


@triton.jit
def _merge(
    maximum: tensor, total: tensor, acc: tensor, more_maximum: tensor, more_total: tensor, more_acc: tensor
) -> tensor:
    """What some splits have, and what one more has: the second into the first."""
    new = tl.maximum(maximum, more_maximum)
    old_scale, more_scale = _decay(maximum, new), _decay(more_maximum, new)
    total = tl.fma(more_total, more_scale, total * old_scale)
    acc = tl.fma(more_acc, more_scale[:, None], acc * old_scale[:, None])
    return new, total, acc


@triton.jit
def _finish(total: tensor, acc: tensor) -> tensor:
    """Weighted means. Adding 0 makes -0 the same as 0: the sign of a zero could tell of unseen keys."""
    return tl.div_rn(acc, tl.where(total == 0.0, 1.0, total)[:, None]) + 0.0


@triton.jit
def _as_operand(values: tensor, q: tensor, IS_WIDE: constexpr) -> tensor:
    if values.dtype == tl.uint8:
        values = from_e4m3(values)
    return values.to(tl.float32 if IS_WIDE else q.dtype.element_ty)


@triton.jit
def _walk_split(
    queries: tensor, q: tensor, keys: tensor, values: tensor, key_scales: tensor, value_scales: tensor, table: tensor,
    kv_head: tensor, positions: tensor, context_len: tensor, first: tensor, stop: tensor, scale: tensor, window: tensor,
    K: constexpr, H: constexpr, BLOCK: constexpr, BLOCK_SIZE: constexpr, HAS_WINDOW: constexpr, HAS_SCALES: constexpr,
    IS_WIDE: constexpr, ROWS: constexpr, TILE: constexpr,
) -> tensor:  # fmt: skip
    """Tiles [first, stop) of one split: maximum and denominator [ROWS], weighted values [ROWS, BLOCK]."""
    columns = tl.arange(0, BLOCK)
    maximum = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    acc = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in range(first, stop):
        key = tile * TILE + tl.arange(0, TILE)
        is_key = key < context_len
        block = tl.load(table + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        place = (block * BLOCK_SIZE + key % BLOCK_SIZE) * K + kv_head
        k = tl.load(
            keys + place[None, :] * H + columns[:, None], mask=is_key[None, :] & (columns < H)[:, None], other=0.0
        )
        scores = tl.dot(queries, _as_operand(k, q, IS_WIDE), input_precision="ieee") * scale
        if HAS_SCALES:
            scores = scores * tl.load(key_scales + place, mask=is_key, other=0.0)[None, :]
        age = positions[:, None] - key[None, :]
        is_hidden = age < 0
        if HAS_WINDOW:
            is_hidden = is_hidden | (age >= window)
        scores = tl.where(is_hidden, float("-inf"), scores)
        new = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - tl.where(new == float("-inf"), 0.0, new)[:, None])
        decay = _decay(maximum, new)
        total = tl.fma(total, decay, tl.sum(weights, 1))
        if HAS_SCALES:
            weights = weights * tl.load(value_scales + place, mask=is_key, other=0.0)[None, :]
        v = tl.load(
            values + place[:, None] * H + columns[None, :], mask=is_key[:, None] & (columns < H)[None, :], other=0.0
        )
        acc = tl.dot(
            _as_operand(weights, q, IS_WIDE), _as_operand(v, q, IS_WIDE), acc * decay[:, None], input_precision="ieee"
        )
        maximum = new
    return maximum, total, acc


@triton.jit(do_not_specialize=["window"])
def _attention_kernel(
    q: tensor, keys: tensor, values: tensor, key_scales: tensor, value_scales: tensor, items: tensor,
    token_positions: tensor, tables: tensor, head_columns: tensor, kv_heads: tensor, out: tensor, partial: tensor,
    scale: tensor, window: tensor,
    GROUP: constexpr, COLUMNS: constexpr, H: constexpr, ROWS: constexpr, BLOCK: constexpr, NUM_GROUPS: constexpr,
    K: constexpr, BLOCK_SIZE: constexpr, HAS_WINDOW: constexpr, HAS_SCALES: constexpr, IS_WIDE: constexpr,
    TILE: constexpr, SPLIT: constexpr,
) -> None:  # fmt: skip
    """q [T, COLUMNS], keys and values [slots, K, H] → out [T, COLUMNS], or one part of it.

    items [I, 7]: first token and number of tokens, start of the sequence's blocks in `tables`, its keys, tiles
    [first, stop), and the row of `partial` [*, groups, H + 4] from which on the part is written, or -1.
    A program has an item and a group; its row r is token r // GROUP with head r % GROUP. An item may have no tokens.
    """
    item, group = items + tl.program_id(0) * 7, tl.program_id(1)
    first_token, num_tokens = tl.load(item), tl.load(item + 1)
    table, context_len = tables + tl.load(item + 2), tl.load(item + 3)
    first, stop, part = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    token, kv_head = rows // GROUP, tl.load(kv_heads + group).to(tl.int64)
    column = tl.load(head_columns + group * GROUP + rows % GROUP)
    is_row = (token < num_tokens) & (column >= 0)
    places = ((first_token + token).to(tl.int64) * COLUMNS + column)[:, None] + columns[None, :]
    inside = is_row[:, None] & (columns < H)[None, :]
    queries = _as_operand(tl.load(q + places, mask=inside, other=0.0), q, IS_WIDE)
    positions = tl.load(token_positions + first_token + token, mask=token < num_tokens, other=0)
    maximum = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    acc = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for split in range(first // SPLIT, (stop + SPLIT - 1) // SPLIT):
        more_maximum, more_total, more_acc = _walk_split(
            queries, q, keys, values, key_scales, value_scales, table, kv_head, positions, context_len,
            tl.maximum(first, split * SPLIT), tl.minimum(stop, (split + 1) * SPLIT), scale, window, K, H, BLOCK,
            BLOCK_SIZE, HAS_WINDOW, HAS_SCALES, IS_WIDE, ROWS, TILE,
        )  # fmt: skip
        maximum, total, acc = _merge(maximum, total, acc, more_maximum, more_total, more_acc)
    if part < 0:
        tl.store(out + places, _finish(total, acc).to(out.dtype.element_ty), mask=inside)
    else:
        target = partial + ((part + rows).to(tl.int64) * NUM_GROUPS + group) * (H + 4)
        tl.store(target[:, None] + columns[None, :], acc, mask=inside)
        tl.store(target + H, maximum, mask=is_row)
        tl.store(target + H + 1, total, mask=is_row)


@triton.jit
def _merge_kernel(
    partial: tensor, merged: tensor, head_columns: tensor, out: tensor, GROUP: constexpr, COLUMNS: constexpr,
    H: constexpr, ROWS: constexpr, BLOCK: constexpr, NUM_GROUPS: constexpr,
) -> None:  # fmt: skip
    """partial [*, groups, H + 4] → out [T, COLUMNS]: splits are merged in ascending order, as in one program.

    merged [*, 4]: first token and number of tokens, first row of `partial`, number of splits.
    """
    item, group = merged + tl.program_id(0) * 4, tl.program_id(1)
    first_token, num_tokens, start = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    token = rows // GROUP
    column = tl.load(head_columns + group * GROUP + rows % GROUP)
    is_row = (token < num_tokens) & (column >= 0)
    inside = is_row[:, None] & (columns < H)[None, :]
    maximum = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    acc = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for split in range(0, tl.load(item + 3)):
        row = (start + split * num_tokens * GROUP + rows).to(tl.int64)
        source = partial + (row * NUM_GROUPS + group) * (H + 4)
        more_acc = tl.load(source[:, None] + columns[None, :], mask=inside, other=0.0)
        more_maximum = tl.load(source + H, mask=is_row, other=float("-inf"))
        more_total = tl.load(source + H + 1, mask=is_row, other=0.0)
        maximum, total, acc = _merge(maximum, total, acc, more_maximum, more_total, more_acc)
    places = ((first_token + token).to(tl.int64) * COLUMNS + column)[:, None] + columns[None, :]
    tl.store(out + places, _finish(total, acc).to(out.dtype.element_ty), mask=inside)
