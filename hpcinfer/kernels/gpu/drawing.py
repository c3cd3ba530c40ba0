"""Triton kernels that draw ids: a program for each row, which walks through its logits, grain by grain, block by block.

A weight is an integer, exp((logit - highest) / temperature) in units of 2 ** -44, so that sums are exact in any order:
no id depends on the company of its row, and what is found among a few candidates is what all ids would have given. The
weights of 2 ** 18 ids can be added. Logits are ordered by integers of 32 bits, of which equal ones are alike.

Shape letters: R rows, G grains, U padded ids of a grain.
"""

import triton
import triton.language as tl
from triton.language import constexpr, tensor

ONE = constexpr(17592186044416.0)  # 2 ** 44, the weight of the highest logit
LOWEST = constexpr(-2139095041)  # the order of -inf
NONE = constexpr(0x7FFFFFFF)  # instead of a place
FIELDS = constexpr(6)  # of a draw: temperature, top_k, top_p, min_p, u, known id
BUCKETS = constexpr(128)  # of a quarter of a nat, the last one for all below


@triton.jit
def block(row: tensor, columns: tensor, inside: tensor) -> tensor:
    """Logits; NaN, and what is outside, as -inf, and -0 as 0."""
    values = tl.load(row + columns, mask=inside, other=float("-inf"))
    values = tl.where(values == values, values, float("-inf"))
    return tl.where(values == 0.0, 0.0, values)


@triton.jit
def highest(
    logits: tensor, sizes: tensor, last_value: tensor, last_place: tensor, G: constexpr, U: constexpr, BLOCK: constexpr
) -> tensor:
    """The best logit of a row that comes after another one, and its place: value descending, place ascending."""
    lanes = tl.arange(0, BLOCK)
    best, places = tl.full([BLOCK], float("-inf"), tl.float32), tl.full([BLOCK], NONE, tl.int32)
    first = 0
    for grain in range(G):
        size = tl.load(sizes + grain)
        for start in range(0, size, BLOCK):
            inside = start + lanes < size
            values, here = block(logits + grain * U, start + lanes, inside), first + start + lanes
            is_after = (values < last_value) | ((values == last_value) & (here > last_place))
            is_better = inside & is_after & ((values > best) | (places == NONE))
            best, places = tl.where(is_better, values, best), tl.where(is_better, here, places)
        first += size
    value = tl.max(best, 0)
    return value, tl.min(tl.where(best == value, places, NONE), 0)


@triton.jit
def _order(values: tensor) -> tensor:
    """Integers in the order of float32 values; the function is its own inverse on their bits."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(order: tensor) -> tensor:
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weights(values: tensor, peak: tensor, temperature: tensor, min_p: tensor) -> tensor:
    """Integer weights of logits, of which the highest is finite."""
    weights = tl.exp(tl.div_rn(values - peak, temperature))
    return (tl.where(weights < min_p, 0.0, weights) * ONE).to(tl.int64)


@triton.jit
def _temperature(draw: tensor) -> tensor:
    """Of a draw, within what float32 can divide by."""
    return tl.minimum(tl.maximum(tl.load(draw), 1e-20), 1e20).to(tl.float32)


@triton.jit
def _share(total: tensor, top_p: tensor) -> tensor:
    """The least integer that is at least a share of the total."""
    wanted = total.to(tl.float64) * top_p
    floor = wanted.to(tl.int64)
    return tl.where(top_p < 1.0, tl.where(floor.to(tl.float64) < wanted, floor + 1, floor), total)


@triton.jit
def _target(total: tensor, u: tensor) -> tensor:
    """What a sum of weights must exceed."""
    return tl.minimum((total.to(tl.float64) * u).to(tl.int64), total - 1)


@triton.jit
def _sum_from(
    logits: tensor, sizes: tensor, least: tensor, peak: tensor, temperature: tensor, min_p: tensor,
    COUNTS: constexpr, G: constexpr, U: constexpr, BLOCK: constexpr,
) -> tensor:  # fmt: skip
    """Sum of the weights, or number, of logits whose order is `least` or higher."""
    lanes, sums = tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.int64)
    for grain in range(G):
        size = tl.load(sizes + grain)
        for start in range(0, size, BLOCK):
            inside = start + lanes < size
            values = block(logits + grain * U, start + lanes, inside)
            is_in = inside & (_order(values).to(tl.int64) >= least)
            if COUNTS:
                sums += is_in.to(tl.int64)
            else:
                sums += tl.where(is_in, _weights(values, peak, temperature, min_p), 0)
    return tl.sum(sums, 0)


@triton.jit
def _by_id(
    logits: tensor, sizes: tensor, target: tensor, peak: tensor, temperature: tensor, min_p: tensor, G: constexpr,
    U: constexpr, BLOCK: constexpr,
) -> tensor:  # fmt: skip
    """The first id, in their own order, at which the sum of weights exceeds the target."""
    lanes, below = tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.int32)
    total = tl.sum(tl.zeros([BLOCK], tl.int64), 0)
    for grain in range(G):
        size = tl.load(sizes + grain)
        for start in range(0, size, BLOCK):
            inside = start + lanes < size
            values = block(logits + grain * U, start + lanes, inside)
            weights = _weights(values, peak, temperature, min_p)
            below += (inside & (total + tl.cumsum(weights, 0) <= target)).to(tl.int32)
            total += tl.sum(weights, 0)
    return tl.sum(below, 0)


@triton.jit
def draw_kernel(
    logits: tensor, sizes: tensor, draws: tensor, ids: tensor, peaks: tensor, totals: tensor, G: constexpr,
    U: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """Ids of rows without top_k and top_p; -1 of others, of which the highest logit and the sum of weights are kept."""
    row = tl.program_id(0).to(tl.int64)
    row_logits, draw = logits + row * G * U, draws + row * FIELDS
    known = tl.load(draw + 5).to(tl.int64)
    if known >= 0:
        tl.store(ids + row, known)
    else:
        peak, place = highest(row_logits, sizes, float("inf"), -1, G, U, BLOCK)
        is_spread = (tl.load(draw) > 0.0) & (peak > float("-inf")) & (peak < float("inf"))
        if is_spread:
            temperature, min_p = _temperature(draw), tl.load(draw + 3).to(tl.float32)
            total = _sum_from(row_logits, sizes, LOWEST, peak, temperature, min_p, False, G, U, BLOCK)
            if (tl.load(draw + 1) > 0.0) | (tl.load(draw + 2) < 1.0):
                tl.store(peaks + row, peak)
                tl.store(totals + row, total)
                tl.store(ids + row, -1)
            else:
                target = _target(total, tl.load(draw + 4))
                found = _by_id(row_logits, sizes, target, peak, temperature, min_p, G, U, BLOCK)
                tl.store(ids + row, found.to(tl.int64))
        else:
            tl.store(ids + row, tl.where(place == NONE, 0, place).to(tl.int64))


@triton.jit
def _bucket(values: tensor, peak: tensor, temperature: tensor) -> tensor:
    """How far below the highest logit, the same for equal ones."""
    return tl.minimum(tl.div_rn(peak - values, temperature) * 4.0, BUCKETS - 1.0).to(tl.int32)


@triton.jit
def narrow_kernel(
    logits: tensor, sizes: tensor, draws: tensor, ids: tensor, peaks: tensor, values_out: tensor, places_out: tensor,
    counts: tensor, G: constexpr, U: constexpr, BLOCK: constexpr, LIMIT: constexpr,
) -> None:  # fmt: skip
    """Of rows that are still to be drawn: as many whole buckets of the highest logits as LIMIT has room for."""
    row, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    if tl.load(ids + row) < 0:
        peak, temperature = tl.load(peaks + row), _temperature(draws + row * FIELDS)
        histogram = tl.zeros([BUCKETS], tl.int32)
        for grain in range(G):
            size = tl.load(sizes + grain)
            for start in range(0, size, BLOCK):
                values = block(logits + (row * G + grain) * U, start + lanes, start + lanes < size)
                histogram += tl.histogram(_bucket(values, peak, temperature), BUCKETS)
        num_buckets = tl.minimum(tl.sum((tl.cumsum(histogram, 0) <= LIMIT).to(tl.int32), 0), BUCKETS - 1)
        first, count = 0, 0
        for grain in range(G):
            size = tl.load(sizes + grain)
            for start in range(0, size, BLOCK):
                values = block(logits + (row * G + grain) * U, start + lanes, start + lanes < size)
                is_in = _bucket(values, peak, temperature) < num_buckets
                targets = row * LIMIT + count + tl.cumsum(is_in.to(tl.int32), 0) - 1
                tl.store(values_out + targets, values, mask=is_in)
                tl.store(places_out + targets, first + start + lanes, mask=is_in)
                count += tl.sum(is_in.to(tl.int32), 0)
            first += size
        tl.store(counts + row, count)


@triton.jit
def choose_kernel(
    draws: tensor, ids: tensor, peaks: tensor, totals: tensor, values: tensor, places: tensor, counts: tensor,
    LIMIT: constexpr,
) -> None:  # fmt: skip
    """Draw among the candidates of a row, if they are all that top_k and top_p leave."""
    row, each = tl.program_id(0).to(tl.int64), tl.arange(0, LIMIT)
    if tl.load(ids + row) < 0:
        draw, count, whole = draws + row * FIELDS, tl.load(counts + row), tl.load(totals + row)
        value = tl.load(values + row * LIMIT + each, mask=each < count, other=float("-inf"))
        place = tl.load(places + row * LIMIT + each, mask=each < count, other=NONE)
        keys = (_order(value).to(tl.int64) << 32) | (place ^ NONE).to(tl.int64)
        keys = tl.sort(keys, descending=True)
        place = (keys & 0x7FFFFFFF).to(tl.int32) ^ NONE
        min_p, top_k = tl.load(draw + 3).to(tl.float32), tl.load(draw + 1).to(tl.int64)
        weights = _weights(_value((keys >> 32).to(tl.int32)), tl.load(peaks + row), _temperature(draw), min_p)
        weights = tl.where(each < count, weights, 0)
        is_all = tl.sum(weights, 0) == whole
        weights = tl.where((top_k > 0) & (each >= top_k), 0, weights)
        sums, found = tl.cumsum(weights, 0), tl.sum(weights, 0)
        wanted = _share(tl.where(top_k > 0, found, whole), tl.load(draw + 2))
        kept = tl.sum(tl.where(sums - weights < wanted, weights, 0), 0)
        index = tl.sum((sums <= _target(kept, tl.load(draw + 4))).to(tl.int32), 0)
        if is_all | tl.where(top_k > 0, top_k <= count, found >= wanted):
            tl.store(ids + row, tl.sum(tl.where(each == index, place, 0), 0).to(tl.int64))


@triton.jit
def _find(
    logits: tensor, sizes: tensor, wanted: tensor, peak: tensor, temperature: tensor, min_p: tensor, COUNTS: constexpr,
    G: constexpr, U: constexpr, BLOCK: constexpr,
) -> tensor:  # fmt: skip
    """The highest order from which on the sum of weights, or the number of logits, is at least what is wanted."""
    low, high = tl.full([], LOWEST, tl.int64), _order(peak).to(tl.int64) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        is_enough = _sum_from(logits, sizes, middle, peak, temperature, min_p, COUNTS, G, U, BLOCK) >= wanted
        low, high = tl.where(is_enough, middle, low), tl.where(is_enough, high, middle)
    return low


@triton.jit
def _place_of(
    logits: tensor, sizes: tensor, order: tensor, rank: tensor, G: constexpr, U: constexpr, BLOCK: constexpr
) -> tensor:
    """Place of a logit among all of the same order, of which `rank` come before it."""
    lanes, place = tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.int32)
    first, seen = 0, tl.sum(tl.zeros([BLOCK], tl.int64), 0)
    for grain in range(G):
        size = tl.load(sizes + grain)
        for start in range(0, size, BLOCK):
            inside = start + lanes < size
            values = block(logits + grain * U, start + lanes, inside)
            is_same = (inside & (_order(values).to(tl.int64) == order)).to(tl.int64)
            is_it = (is_same > 0) & (seen + tl.cumsum(is_same, 0) - 1 == rank)
            place += tl.where(is_it, first + start + lanes, 0)
            seen += tl.sum(is_same, 0)
        first += size
    return tl.sum(place, 0)


@triton.jit
def search_kernel(
    logits: tensor, sizes: tensor, draws: tensor, ids: tensor, peaks: tensor, totals: tensor, num_ids: tensor,
    G: constexpr, U: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """Draw rows whose candidates were too few: bounds of top_k, of top_p and of the draw are searched one by one."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(ids + row) < 0:
        here, draw, peak = logits + row * G * U, draws + row * FIELDS, tl.load(peaks + row)
        temperature, min_p = _temperature(draw), tl.load(draw + 3).to(tl.float32)
        top_k, total = tl.minimum(tl.load(draw + 1), num_ids).to(tl.int64), tl.load(totals + row)
        edge = tl.full([], LOWEST, tl.int64)
        if top_k > 0:
            edge = _find(here, sizes, top_k, peak, temperature, min_p, True, G, U, BLOCK)
            equal = top_k - _sum_from(here, sizes, edge + 1, peak, temperature, min_p, True, G, U, BLOCK)
            total = _sum_from(here, sizes, edge + 1, peak, temperature, min_p, False, G, U, BLOCK)
            total += equal * _weights(_value(edge.to(tl.int32)), peak, temperature, min_p)
        wanted = _share(total, tl.load(draw + 2))
        cut = _find(here, sizes, wanted, peak, temperature, min_p, False, G, U, BLOCK)
        cut = tl.maximum(cut, edge)
        above = _sum_from(here, sizes, cut + 1, peak, temperature, min_p, False, G, U, BLOCK)
        weight = tl.maximum(_weights(_value(cut.to(tl.int32)), peak, temperature, min_p), 1)
        kept = above + (wanted - above + weight - 1) // weight * weight
        target = _target(kept, tl.load(draw + 4))
        order = _find(here, sizes, target + 1, peak, temperature, min_p, False, G, U, BLOCK)
        above = _sum_from(here, sizes, order + 1, peak, temperature, min_p, False, G, U, BLOCK)
        rank = (target - above) // tl.maximum(_weights(_value(order.to(tl.int32)), peak, temperature, min_p), 1)
        tl.store(ids + row, _place_of(here, sizes, order, rank, G, U, BLOCK).to(tl.int64))
