"""Triton kernels over rows of a batch: embedding, RMSNorm, SiLU, rotary with the writing of K and V, and codes.

A program works on one row, or on some heads of one token: no bit of a row can depend on another. Sums of a row are
added in one tree, which its compile-time size alone fixes. Nothing is contracted (no `enable_fp_fusion`).

Shape letters: T rows, D columns of a row, N query heads, K KV heads, H head size, S slots of the cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from hpcinfer.kernels.gpu.codes import KINDS, LARGEST, codes_of, finite, from_e4m3, loadable, scale_of, writable

EXACT = {"enable_fp_fusion": False}  # of a launch: what is multiplied is rounded before it is added
_ROTATED = 32  # heads of tokens of one program that rotates


class KvCache(NamedTuple):
    """K and V of one layer; int8 and e4m3 have a scale per slot and KV head."""

    keys: Tensor  # [S, K, H]
    values: Tensor  # [S, K, H]
    key_scales: Tensor | None  # float32 [S, K]
    value_scales: Tensor | None
    block_size: int


class Operand(NamedTuple):
    """Rows that are multiplied."""

    values: Tensor  # [T, I] in the type of the product, or codes
    scales: Tensor | None  # of codes: float32 [T, runs]


class Rotation(NamedTuple):
    """What one layer does with heads before attention."""

    rope: Tensor  # [max_len, 2, H / 2]
    q_norm: Tensor | None  # [H]
    k_norm: Tensor | None
    eps: float
    head_columns: Tensor  # int32 [N]: first column of each query head
    q_columns: int  # of all grains, room for heads that are not there included


def embed(table: Tensor, scales: Tensor | None, rows: Tensor) -> Tensor:
    """Rows of a table [V, D], or zeros where the row is -1: float32 [T, D] without -0."""
    out = torch.empty(len(rows), table.shape[1], device=table.device)
    if len(rows):
        _embed_kernel[(len(rows),)](
            loadable(table), scales, rows, out, D=table.shape[1], BLOCK=_block(table.shape[1]),
            HAS_SCALES=scales is not None, **EXACT,
        )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, rows: Tensor | None = None) -> Operand:
    """x * weight / sqrt(mean(x ** 2) + eps) of all rows of x [*, D], or of some: [T, D] in `dtype`, or codes of it."""
    num_rows, size = len(x) if rows is None else len(rows), x.shape[1]
    out = torch.empty(num_rows, size, dtype=dtype, device=x.device)
    scales = torch.empty(num_rows, 1, device=x.device) if dtype in KINDS else None
    if num_rows:
        _norm_kernel[(num_rows,)](
            aligned(x), rows, weight, writable(out), scales, eps, D=size, BLOCK=_block(size),
            HAS_ROWS=rows is not None, KIND=KINDS.get(dtype, 0), num_warps=8 if size > 4096 else 4, **EXACT,
        )  # fmt: skip
    return Operand(out, scales)


def silu_mul(gate_up: Tensor, dtype: torch.dtype) -> Tensor:
    """gate * sigmoid(gate) * up of [T, 2 * D], computed in float32: [T, D] in `dtype`."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_rows, size, dtype=dtype, device=gate_up.device)
    if out.numel():
        _silu_kernel[(num_rows, triton.cdiv(size, 1024))](gate_up, out, D=size, BLOCK=1024, **EXACT)
    return out


def rotate_and_store(
    qkv: Tensor, step_positions: Tensor, slots: Tensor, rotation: Rotation, cache: KvCache, dtype: torch.dtype
) -> Tensor:
    """Norm and rotate q and k of [T, q columns + 2 * K * H], write k and v into the cache: q [T, q columns]."""
    num_heads, (_, num_kv_heads, size) = len(rotation.head_columns), cache.keys.shape
    q = torch.empty(len(qkv), rotation.q_columns, dtype=dtype, device=qkv.device)
    heads = triton.next_power_of_2(min(8, max(1, num_heads, num_kv_heads)))
    q_parts, kv_parts = triton.cdiv(num_heads, heads), triton.cdiv(num_kv_heads, heads)
    if len(qkv) and q_parts + kv_parts:
        has_codes, tokens = cache.key_scales is not None, _ROTATED // heads
        _rotate_kernel[triton.cdiv(len(qkv), tokens), q_parts + 2 * kv_parts](
            qkv, step_positions, slots, rotation.rope, rotation.q_norm, rotation.k_norm, rotation.head_columns, q,
            writable(cache.keys), writable(cache.values), cache.key_scales, cache.value_scales, rotation.eps,
            len(qkv), N=num_heads, K=num_kv_heads, HALF=size // 2, BLOCK=_block(size // 2), TOKENS=tokens, HEADS=heads,
            Q_COLUMNS=rotation.q_columns, Q_PARTS=q_parts, KV_PARTS=max(1, kv_parts),
            HAS_NORM=rotation.q_norm is not None, KIND=KINDS.get(cache.keys.dtype, 0),
            LIMIT=torch.finfo(torch.float32 if has_codes else cache.keys.dtype).max, **EXACT,
        )  # fmt: skip
    return q


def quantise(x: Tensor, num_runs: int, dtype: torch.dtype = torch.int8) -> Operand:
    """Codes [T, I] and scales [T, runs] of rows [T, I] cut into equal runs; a run of zeros has the scale 0."""
    num_rows, size = x.shape[0], x.shape[1] // num_runs
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(num_rows, num_runs, device=x.device)
    if codes.numel():
        _quantise_kernel[(num_rows, num_runs)](
            x, writable(codes), scales, D=size, BLOCK=_block(size), KIND=KINDS[dtype], **EXACT
        )
    return Operand(codes, scales)


def aligned(x: Tensor) -> Tensor:
    """The tensor, or a copy that begins at a multiple of 16 bytes: kernels that differ in that may differ in bits."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


@triton.jit
def _embed_kernel(
    table: tensor, scales: tensor, rows: tensor, out: tensor, D: constexpr, BLOCK: constexpr, HAS_SCALES: constexpr
) -> None:
    """table [V, D], rows int32 [T] → out [T, D]; a program per row."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + token).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < D
    values = tl.load(table + row * D + columns, mask=columns < tl.where(row >= 0, D, 0), other=0.0)
    values = (from_e4m3(values) if values.dtype == tl.uint8 else values).to(tl.float32)
    if HAS_SCALES:
        values = values * tl.load(scales + row, mask=row >= 0, other=0.0)
    tl.store(out + token * D + columns, values + 0.0, mask=is_inside)


@triton.jit
def store_normed(
    values: tensor, weight: tensor, out: tensor, scales: tensor, row: tensor, eps: tensor, D: constexpr,
    BLOCK: constexpr, KIND: constexpr,
) -> None:  # fmt: skip
    """RMSNorm of values [BLOCK], which are 0 from D on → a row of out [T, D], and its scale of codes.

    The squares are added in one tree."""
    columns = tl.arange(0, BLOCK)
    is_inside = columns < D
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(values * values, 0), D * 1.0) + eps))
    values = values * scale * tl.load(weight + columns, mask=is_inside, other=0.0)
    if KIND:
        values = finite(values, LARGEST)
        largest = tl.max(tl.abs(values), 0)
        tl.store(scales + row, scale_of(largest, KIND))
        values = codes_of(values, largest, KIND)
    tl.store(out + row * D + columns, values.to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def _norm_kernel(
    x: tensor, rows: tensor, weight: tensor, out: tensor, scales: tensor, eps: tensor, D: constexpr, BLOCK: constexpr,
    HAS_ROWS: constexpr, KIND: constexpr,
) -> None:
    """x [*, D], rows int32 [T] or none → out [T, D], and scales [T] of codes. A program per row."""
    target = tl.program_id(0).to(tl.int64)
    source = target
    if HAS_ROWS:
        source = tl.load(rows + target).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < D
    values = tl.load(x + source * D + columns, mask=is_inside, other=0.0)
    store_normed(values, weight, out, scales, target, eps, D, BLOCK, KIND)


@triton.jit
def silu_times(gate: tensor, up: tensor) -> tensor:
    """gate * sigmoid(gate) * up of float32 tensors."""
    return tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up


@triton.jit
def _silu_kernel(gate_up: tensor, out: tensor, D: constexpr, BLOCK: constexpr) -> None:
    """gate_up [T, 2, D] → out [T, D]; a program per row and BLOCK columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < D
    gate = tl.load(gate_up + row * 2 * D + columns, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * D + D + columns, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(out + row * D + columns, silu_times(gate, up).to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def _quantise_kernel(
    x: tensor, codes: tensor, scales: tensor, D: constexpr, BLOCK: constexpr, KIND: constexpr
) -> None:
    """x [T, runs, D] → codes [T, runs, D], scales [T, runs]; a program per run. NaN counts as 0."""
    run = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < D
    values = finite(tl.load(x + run * D + columns, mask=is_inside, other=0.0).to(tl.float32), LARGEST)
    largest = tl.max(tl.abs(values), 0)
    tl.store(codes + run * D + columns, codes_of(values, largest, KIND), mask=is_inside)
    tl.store(scales + run, scale_of(largest, KIND))


@triton.jit
def _normed(first: tensor, second: tensor, weight: tensor, eps: tensor, HALF: constexpr, BLOCK: constexpr) -> tensor:
    """RMSNorm of heads that are given as two halves [heads, BLOCK]."""
    half = tl.arange(0, BLOCK)
    mean = tl.div_rn(tl.sum(first * first, 1) + tl.sum(second * second, 1), 2.0 * HALF)
    scale = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None]
    first = first * scale * tl.load(weight + half, mask=half < HALF, other=0.0)[None, :]
    second = second * scale * tl.load(weight + HALF + half, mask=half < HALF, other=0.0)[None, :]
    return first, second


@triton.jit
def _rotated(first: tensor, second: tensor, angles: tensor, inside: tensor, HALF: constexpr) -> tensor:
    """Columns i and i + HALF of heads [heads, BLOCK], rotated together; `angles` points to their cosines."""
    cosine = tl.load(angles, mask=inside, other=0.0)
    sine = tl.load(angles + HALF, mask=inside, other=0.0)
    return first * cosine - second * sine, second * cosine + first * sine


@triton.jit
def _store(
    first: tensor, second: tensor, cache: tensor, scales: tensor, place: tensor, half: tensor, inside: tensor,
    is_head: tensor, HALF: constexpr, KIND: constexpr, LIMIT: constexpr,
) -> None:  # fmt: skip
    """Two halves of heads [heads, BLOCK] into the cache [S * K, H], in its precision."""
    first, second = finite(first, LIMIT), finite(second, LIMIT)
    if KIND:
        largest = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
        first, second = codes_of(first, largest[:, None], KIND), codes_of(second, largest[:, None], KIND)
        tl.store(scales + place, scale_of(largest, KIND), mask=is_head)
    targets = cache + (place * (2 * HALF))[:, None] + half[None, :]
    tl.store(targets, first.to(cache.dtype.element_ty), mask=inside)
    tl.store(targets + HALF, second.to(cache.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _rotate_kernel(
    qkv: tensor, positions: tensor, slots: tensor, rope: tensor, q_norm: tensor, k_norm: tensor, head_columns: tensor,
    q: tensor, keys: tensor, values: tensor, key_scales: tensor, value_scales: tensor, eps: tensor, num_tokens: tensor,
    N: constexpr, K: constexpr, HALF: constexpr, BLOCK: constexpr, TOKENS: constexpr, HEADS: constexpr,
    Q_COLUMNS: constexpr, Q_PARTS: constexpr, KV_PARTS: constexpr, HAS_NORM: constexpr, KIND: constexpr,
    LIMIT: constexpr,
) -> None:  # fmt: skip
    """qkv [T, Q_COLUMNS + 2 * K * H] → q [T, Q_COLUMNS], and slots of keys and values [S, K, H].

    A program has HEADS heads of each of TOKENS tokens: of q, then of k, then of v, by its second index.
    """
    part, half = tl.program_id(1), tl.arange(0, BLOCK)
    each = tl.arange(0, TOKENS * HEADS)
    token, is_q, is_v = tl.program_id(0) * TOKENS + each // HEADS, part < Q_PARTS, part >= Q_PARTS + KV_PARTS
    head = tl.where(is_q, part, (part - Q_PARTS) % KV_PARTS) * HEADS + each % HEADS
    is_head = (head < tl.where(is_q, N, K)) & (token < num_tokens)
    inside = is_head[:, None] & (half < HALF)[None, :]
    kv_column = Q_COLUMNS + (head + tl.where(is_v, K, 0)) * (2 * HALF)
    column = tl.where(is_q, tl.load(head_columns + head, mask=head < tl.where(is_q, N, 0), other=0), kv_column)
    row = token.to(tl.int64)
    source = qkv + (row * (Q_COLUMNS + 4 * HALF * K) + column)[:, None] + half[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    position = tl.load(positions + token, mask=is_head, other=0).to(tl.int64)
    angles = rope + (position * 2 * HALF)[:, None] + half[None, :]
    place = tl.load(slots + token, mask=is_head, other=0).to(tl.int64) * K + head
    if is_q:
        if HAS_NORM:
            first, second = _normed(first, second, q_norm, eps, HALF, BLOCK)
        first, second = _rotated(first, second, angles, inside, HALF)
        target = q + (row * Q_COLUMNS + column)[:, None] + half[None, :]
        tl.store(target, first.to(q.dtype.element_ty), mask=inside)
        tl.store(target + HALF, second.to(q.dtype.element_ty), mask=inside)
    else:
        if is_v:
            _store(first, second, values, value_scales, place, half, inside, is_head, HALF, KIND, LIMIT)
        else:
            if HAS_NORM:
                first, second = _normed(first, second, k_norm, eps, HALF, BLOCK)
            first, second = _rotated(first, second, angles, inside, HALF)
            _store(first, second, keys, key_scales, place, half, inside, is_head, HALF, KIND, LIMIT)
