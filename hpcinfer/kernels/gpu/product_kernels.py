"""The Triton kernels of products: a chain over the inputs of a grain, and the tree over grains.

Shape letters: T rows, G grains; INS inputs of a grain, OUTS outputs.
"""

import triton
import triton.language as tl
from triton.language import constexpr, tensor

from hpcinfer.kernels.gpu.codes import E4M3, INT8, from_e4m3
from hpcinfer.kernels.gpu.rows import silu_times


@triton.jit
def _operand(values: tensor, IS_WIDE: constexpr) -> tensor:
    """What is multiplied; bytes are e4m3 on a device that lacks the type."""
    if values.dtype == tl.uint8:
        values = from_e4m3(values)
    elif IS_WIDE:
        values = values.to(tl.float32)
    return values


@triton.jit
def _grain(
    x: tensor, w: tensor, w_scales: tensor, x_row: tensor, w_row: tensor, is_row: tensor, is_column: tensor,
    grain: tensor, INS: constexpr, W_INS: constexpr, G: constexpr, KIND: constexpr, GROUP: constexpr,
    IS_WIDE: constexpr, ROWS: constexpr, COLUMNS: constexpr, DEPTH: constexpr,
) -> tensor:  # fmt: skip
    """Rows [ROWS, INS] times one grain of a weight [COLUMNS, INS]: one chain over the inputs in ascending order.

    int4 multiplies codes, GROUP inputs at a time, and adds each such sum times the scales of its group. Hopper's tensor
    cores keep fewer bits than float32 of a sum of e4m3 products: those of DEPTH inputs are added outside of them.
    """
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.int32 if KIND == INT8 else tl.float32)
    for start in range(0, W_INS, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        inputs = x + x_row[:, None] + grain * INS + depth[None, :]
        a = _operand(tl.load(inputs, mask=is_row[:, None] & (depth < INS)[None, :], other=0.0), IS_WIDE)
        inside = (depth < W_INS)[:, None] & is_column[None, :]
        if KIND == 4:
            place = grain * W_INS + depth
            pair = tl.load(w + w_row[None, :] * (G * W_INS // 2) + (place // 2)[:, None], mask=inside, other=136)
            code = ((pair >> ((place % 2) * 4)[:, None]) & 15).to(tl.float32) - 8.0
            part = tl.dot(a, code.to(a.dtype), input_precision="ieee")
            groups = w_scales + w_row * (G * W_INS // GROUP) + (grain * W_INS + start) // GROUP
            acc += part * tl.load(groups, mask=is_column, other=0.0)[None, :]
        else:
            b = tl.load(w + w_row[None, :] * (G * W_INS) + (grain * W_INS + depth)[:, None], mask=inside, other=0.0)
            if KIND == INT8:
                acc = tl.dot(a, b, acc, out_dtype=tl.int32)
            elif KIND == E4M3:
                acc = tl.dot(a, _operand(b, IS_WIDE), acc, input_precision="ieee", max_num_imprecise_acc=DEPTH)
            else:
                acc = tl.dot(a, _operand(b, IS_WIDE), acc, input_precision="ieee")
    return acc


@triton.jit
def _count(
    step: tensor, value: tensor, level0: tensor, level1: tensor, level2: tensor, level3: tensor, N: constexpr
) -> tensor:  # fmt: skip
    """Take value number `step` of N (up to 16) into their tree; its root is returned first once all are there.

    A binary counter: level l keeps a sum of 2 ** l values until the one to its right is there.
    """
    total = value
    if N >= 2:
        total, level0 = level0 + value, value
    if N >= 4:
        pair = total
        total, level1 = level1 + pair, tl.where(step % 4 == 1, pair, level1)
    if N >= 8:
        four = total
        total, level2 = level2 + four, tl.where(step % 8 == 3, four, level2)
    if N >= 16:
        eight = total
        total, level3 = level3 + eight, tl.where(step % 16 == 7, eight, level3)
    return total, level0, level1, level2, level3


@triton.jit(do_not_specialize=["num_rows", "first_grain"])
def product_kernel(
    x: tensor, w: tensor, bias: tensor, x_scales: tensor, w_scales: tensor, out: tensor, num_rows: tensor,
    first_grain: tensor, OUTS: constexpr, INS: constexpr, W_INS: constexpr, G: constexpr, WALK: constexpr,
    GATED: constexpr, HAS_BIAS: constexpr, KIND: constexpr, GROUP: constexpr, IS_WIDE: constexpr,
    ROWS: constexpr, COLUMNS: constexpr, DEPTH: constexpr, BAND: constexpr,
) -> None:  # fmt: skip
    """x [T, G * INS], w [*, G * W_INS] → out [nodes, T, OUTS]; a program per tile and node.

    A node is the tree over WALK grains, the first one from `first_grain` on. Inputs from INS to W_INS are zeros.
    Where GATED, half of a program's columns are gates, the others what they multiply.
    """
    WIDTH: constexpr = COLUMNS // 2 if GATED else COLUMNS
    # Programs that run at one time share rows as well as columns: both are read from the cache in between.
    num_row_tiles, band = tl.cdiv(num_rows, ROWS), BAND * tl.cdiv(OUTS, WIDTH)
    first_tile = tl.program_id(0) // band * BAND
    height = tl.minimum(num_row_tiles - first_tile, BAND)
    row_tile = first_tile + tl.program_id(0) % band % height
    first_column = tl.program_id(0) % band // height * WIDTH
    rows, place = row_tile * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    columns = first_column + place % WIDTH
    is_column = columns < OUTS
    w_rows = columns + tl.where(place < WIDTH, 0, OUTS)
    is_row = rows < num_rows
    x_row, w_row = rows.to(tl.int64) * (G * INS), w_rows.to(tl.int64)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    level0, level1, level2, level3 = total, total, total, total
    first = first_grain + tl.program_id(1) * WALK
    for step in range(0, WALK):
        grain = first + step
        acc = _grain(
            x, w, w_scales, x_row, w_row, is_row, is_column, grain, INS, W_INS, G, KIND, GROUP, IS_WIDE, ROWS, COLUMNS,
            DEPTH,
        )  # fmt: skip
        total = acc.to(tl.float32)
        if KIND >= INT8:
            total = total * tl.load(w_scales + w_row * G + grain, mask=is_column, other=0.0)[None, :]
            total = total * tl.load(x_scales + rows.to(tl.int64) * G + grain, mask=is_row, other=0.0)[:, None]
        total, level0, level1, level2, level3 = _count(step, total, level0, level1, level2, level3, WALK)
    if HAS_BIAS:
        total += tl.load(bias + w_row, mask=is_column, other=0.0)[None, :]
    target = out + ((tl.program_id(1).to(tl.int64) * num_rows + rows) * OUTS)[:, None]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, WIDTH)), (0, 2, 1)))
        columns = first_column + tl.arange(0, WIDTH)
        values, inside = silu_times(gate, up), is_row[:, None] & (columns < OUTS)[None, :]
        tl.store(target + columns[None, :], values.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(target + columns[None, :], total, mask=is_row[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=["size"])
def tree_kernel(nodes: tensor, out: tensor, size: tensor, N: constexpr, BLOCK: constexpr) -> None:
    """nodes [M * N, size] → out [M, size]: the tree over each N of them; a program per BLOCK places."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = places < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    level0, level1, level2, level3 = total, total, total, total
    for step in tl.static_range(0, N):
        node = (tl.program_id(1) * N + step).to(tl.int64)
        value = tl.load(nodes + node * size + places, mask=is_inside, other=0.0)
        total, level0, level1, level2, level3 = _count(step, value, level0, level1, level2, level3, N)
    tl.store(out + tl.program_id(1).to(tl.int64) * size + places, total, mask=is_inside)
