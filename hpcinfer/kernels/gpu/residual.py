"""Additions to the residual stream, in one launch with the norm that follows: the same bits as one after the other.

Shape letters: T rows, D columns of a row.
"""

from collections.abc import Callable
from typing import NamedTuple, ParamSpec

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from hpcinfer.kernels.gpu.codes import KINDS, writable
from hpcinfer.kernels.gpu.rows import EXACT, Operand, aligned, rms_norm, store_normed

P = ParamSpec("P")


class _Addition(NamedTuple):
    """x + (total + bias), which x is to become."""

    x: Tensor
    total: Tensor
    bias: Tensor | None


class Residuals:
    """Adds sums to the residual stream.

    An addition may wait for the norm of the same rows while some work runs, all of which reads the stream through
    `norm`, or after `finish`.
    """

    def __init__(self) -> None:
        self._may_wait = False
        self._waiting: _Addition | None = None

    def around(self, work: Callable[P, Tensor]) -> Callable[P, Tensor]:
        """Let additions wait within this work, at whose end none is left."""

        def wrapped(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            self._may_wait = True
            try:
                out = work(*args, **kwargs)
                self.finish()
            finally:
                self._may_wait, self._waiting = False, None
            return out

        return wrapped

    def add(self, x: Tensor, total: Tensor, bias: Tensor | None = None) -> Tensor:
        """x + (total + bias), in place, now or at the next norm."""
        self.finish()
        self._waiting = _Addition(x, total, bias)
        if not self._may_wait:
            self.finish()
        return x

    def finish(self) -> None:
        """Let no addition wait any more."""
        if self._waiting is not None:
            x, total, bias = self._waiting
            x.add_(total if bias is None else total + bias)
            self._waiting = None

    def norm(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Operand:
        """RMSNorm of all rows of x [T, D], with what is to be added to them, as `rms_norm` gives it."""
        waiting = self._waiting
        if waiting is None or waiting.x is not x or not x.numel() or aligned(x) is not x:
            self.finish()
            return rms_norm(x, weight, eps, dtype)
        out, size = torch.empty(x.shape, dtype=dtype, device=x.device), x.shape[1]
        scales = torch.empty(len(x), 1, device=x.device) if dtype in KINDS else None
        _add_norm_kernel[(len(x),)](
            x, aligned(waiting.total), waiting.bias, weight, writable(out), scales, eps, D=size,
            BLOCK=max(16, triton.next_power_of_2(size)), HAS_BIAS=waiting.bias is not None, KIND=KINDS.get(dtype, 0),
            num_warps=8 if size > 4096 else 4, **EXACT,
        )  # fmt: skip
        self._waiting = None
        return Operand(out, scales)


@triton.jit
def _add_norm_kernel(
    x: tensor, total: tensor, bias: tensor, weight: tensor, out: tensor, scales: tensor, eps: tensor, D: constexpr,
    BLOCK: constexpr, HAS_BIAS: constexpr, KIND: constexpr,
) -> None:  # fmt: skip
    """x [T, D] += total [T, D] + bias [D]; normed → out [T, D], and scales [T] of codes."""
    row = tl.program_id(0).to(tl.int64)
    places = row * D + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < D
    more = tl.load(total + places, mask=is_inside, other=0.0)
    if HAS_BIAS:
        more = more + tl.load(bias + columns, mask=is_inside, other=0.0)
    values = tl.load(x + places, mask=is_inside, other=0.0) + more
    tl.store(x + places, values, mask=is_inside)
    store_normed(values, weight, out, scales, row, eps, D, BLOCK, KIND)
