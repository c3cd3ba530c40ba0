"""What a GPU does with logits [R, G, U]: the best, draws, log-probabilities, and fetching what came of them.

Nothing waits for the device, and no row depends on its company. Numbers that say how rows are drawn travel in one
copy.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from hpcinfer.kernels.gpu.arrays import GpuArrays
from hpcinfer.kernels.gpu.drawing import (
    FIELDS,
    NONE,
    block,
    choose_kernel,
    draw_kernel,
    highest,
    narrow_kernel,
    search_kernel,
)
from hpcinfer.kernels.gpu.rows import EXACT
from hpcinfer.kernels.gpu.step import to_device
from hpcinfer.kernels.protocol import Changes, Draw, GrainBest, GrainStats, Scores
from hpcinfer.partition.grains import Span, tree_reduce

_CANDIDATES = 2048  # of a row that has top_k or top_p: they mostly hold what these leave


class _Grains(NamedTuple):
    """Sizes of grains, on the device."""

    sizes: Tensor  # int32 [G]
    ends: Tensor  # int64 [G]: one behind the last id of each
    num_ids: int


@dataclass(frozen=True)
class GpuFetch:
    """Arrays on their way to the host."""

    arrays: list[Tensor]  # pinned, of the host
    device: GpuArrays
    mark: torch.cuda.Event | None  # behind their copies
    turn: Callable[[], None]
    is_late = True

    def wait(self) -> list[np.ndarray]:
        """Wait until they are there; the driver does not block the thread."""
        self.device.wait(self.turn, self.mark)
        return [each.numpy() for each in self.arrays]


class GpuSampling:
    """Sampling on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._arrays = device, GpuArrays(device)
        self._known: dict[tuple[int, ...], _Grains] = {}

    def best(
        self, logits: Tensor, grain_sizes: tuple[int, ...], changes: Mapping[int, Changes] | None = None
    ) -> GrainBest:
        """The largest true logit of each row."""
        values, places = self._top(self._changed(logits, grain_sizes, changes or {}), grain_sizes, 1)
        return GrainBest(values.view(-1), places.view(-1))

    def stats(self, logits: Tensor, grain_sizes: tuple[int, ...]) -> GrainStats:
        """Maximum and exp-sum of each grain."""
        num_rows, num_grains, width = logits.shape
        stats = GrainStats(*(torch.empty(num_rows, num_grains, device=self._device) for _ in range(2)))
        if num_rows:
            sizes = self._grains(grain_sizes).sizes
            _stats_kernel[num_rows, num_grains](logits, sizes, *stats, U=width, **_blocks(width))
        return stats

    def draw(self, logits: Tensor, grain_sizes: tuple[int, ...], draws: Sequence[Draw]) -> Tensor:
        """Choose an id of each row: int64 [R]."""
        num_rows, num_grains, width = logits.shape
        ids, totals = (torch.empty(num_rows, dtype=torch.int64, device=self._device) for _ in range(2))
        if not num_rows:
            return ids
        changes = {i: each.changes for i, each in enumerate(draws) if each.changes is not None}
        logits, grains = self._changed(logits, grain_sizes, changes), self._grains(grain_sizes)
        fields = np.array([each[: FIELDS.value] for each in draws], np.float64)
        [there] = self._copies(fields)
        peaks = torch.empty(num_rows, device=self._device)
        shape = {"G": num_grains, "U": width, **_blocks(width)}
        draw_kernel[(num_rows,)](logits, grains.sizes, there, ids, peaks, totals, **shape)
        if any((each.top_k > 0 or each.top_p < 1.0) and each.known_id < 0 for each in draws):
            limit = min(_CANDIDATES, triton.next_power_of_2(grains.num_ids))
            values = torch.empty(num_rows, limit, device=self._device)
            places, counts = (torch.empty(size, dtype=torch.int32, device=self._device) for size in
                              ((num_rows, limit), (num_rows,)))  # fmt: skip
            narrow_kernel[(num_rows,)](
                logits, grains.sizes, there, ids, peaks, values, places, counts, **shape, LIMIT=limit
            )
            choose_kernel[(num_rows,)](
                there, ids, peaks, totals, values, places, counts, LIMIT=limit, num_warps=8, **EXACT
            )
            search_kernel[(num_rows,)](logits, grains.sizes, there, ids, peaks, totals, grains.num_ids, **shape)
        return ids

    def score(self, logits: Tensor, grain_sizes: tuple[int, ...], ids: Tensor, num_top: int) -> Scores:
        """What log-probabilities of an id of each row are made of."""
        num_rows, num_grains, width = logits.shape
        grains, stats = self._grains(grain_sizes), self.stats(logits, grain_sizes)
        grain = torch.searchsorted(grains.ends, ids, right=True)
        columns = ids - grains.ends[grain] + grains.sizes[grain]
        places = (torch.arange(num_rows, device=self._device) * num_grains + grain) * width + columns
        peak = stats.maxima.amax(1)
        parts = stats.exp_sums * torch.exp(stats.maxima - peak[:, None])
        total = tree_reduce({Span(g, g + 1): parts[:, g] for g in range(num_grains)}, Span(0, num_grains), torch.add)
        top_values, top_ids = self._top(logits, grain_sizes, min(num_top, grains.num_ids))
        log_sums = peak.double() + total.double().log()
        return Scores(log_sums, logits.view(-1).index_select(0, places), top_ids, top_values)

    def take(self, array: Tensor, rows: list[int]) -> Tensor:
        """Some rows of an array."""
        return array.index_select(0, *to_device([np.array(rows, np.int32)], self._device))

    def fetch(self, arrays: list[Tensor], turn: Callable[[], None]) -> GpuFetch:
        """Start bringing arrays to the host; `turn` is called again and again while they are waited for."""
        hosts = [torch.empty(each.shape, dtype=each.dtype, pin_memory=each.is_cuda) for each in arrays]
        for host, array in zip(hosts, arrays, strict=True):
            host.copy_(array, non_blocking=True)
        return GpuFetch(hosts, self._arrays, self._arrays.mark(), turn)

    def _top(self, logits: Tensor, grain_sizes: tuple[int, ...], count: int) -> tuple[Tensor, Tensor]:
        """Values and places of the largest logits of each row: float32 and int64 [R, count]."""
        num_rows, num_grains, width = logits.shape
        values = torch.empty(num_rows, count, device=self._device)
        places = torch.empty(num_rows, count, dtype=torch.int64, device=self._device)
        if places.numel():
            _top_kernel[(num_rows,)](
                logits, self._grains(grain_sizes).sizes, values, places, count, G=num_grains, U=width, **_blocks(width)
            )
        return values, places

    def _changed(self, logits: Tensor, grain_sizes: tuple[int, ...], changes: Mapping[int, Changes]) -> Tensor:
        """Logits with changes, a copy if there are any."""
        if not changes:
            return logits
        _, num_grains, width = logits.shape
        ends, where = np.cumsum(grain_sizes), []
        for row, change in changes.items():
            grains = np.searchsorted(ends, change.places, side="right")
            where.append((row * num_grains + grains) * width + change.places - (ends - grain_sizes)[grains])
        rest = (np.concatenate(each) for each in list(zip(*changes.values(), strict=True))[1:])
        places, biases, factors, penalties = self._copies(np.concatenate(where), *rest)
        flat = logits.clone().view(-1)
        values = flat.index_select(0, places) + biases
        values = torch.where(values > 0, values / factors, values * factors) - penalties
        return flat.index_copy_(0, places, values).view(logits.shape)

    def _copies(self, *arrays: np.ndarray) -> list[Tensor]:
        """Arrays on the device, in one copy."""
        types = {"float64": torch.float64, "float32": torch.float32, "int64": torch.int64}
        there = to_device([np.ascontiguousarray(each).view(np.int32) for each in arrays], self._device)
        return [copy.view(types[each.dtype.name]) for each, copy in zip(arrays, there, strict=True)]

    def _grains(self, sizes: tuple[int, ...]) -> _Grains:
        if sizes not in self._known:
            there = torch.tensor(sizes, dtype=torch.int32, device=self._device)
            self._known[sizes] = _Grains(there, there.cumsum(0), sum(sizes))
        return self._known[sizes]


def _blocks(width: int) -> dict[str, int | bool]:
    """How a program walks through a grain: a row has few programs, so each has many threads."""
    block = min(8192, max(64, triton.next_power_of_2(width)))
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 512)), **EXACT}


@triton.jit(do_not_specialize=["count"])
def _top_kernel(
    logits: tensor, sizes: tensor, values: tensor, places: tensor, count: tensor, G: constexpr, U: constexpr,
    BLOCK: constexpr,
) -> None:  # fmt: skip
    """Values and places [R, count] of the largest logits; -inf and 0 where there are no ids."""
    row = tl.program_id(0).to(tl.int64)
    value, place = tl.full([], float("inf"), tl.float32), tl.full([], -1, tl.int32)
    for i in range(count):
        value, place = highest(logits + row * G * U, sizes, value, place, G, U, BLOCK)
        tl.store(values + row * count + i, value)
        tl.store(places + row * count + i, tl.where(place == NONE, 0, place).to(tl.int64))


@triton.jit
def _stats_kernel(
    logits: tensor, sizes: tensor, maxima: tensor, exp_sums: tensor, U: constexpr, BLOCK: constexpr
) -> None:
    """Maximum and exp-sum of a grain of a row; lane i adds elements i, i + BLOCK, ..., then the lanes are added."""
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    size, lanes = tl.load(sizes + tl.program_id(1)), tl.arange(0, BLOCK)
    best, sums = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        best = tl.maximum(best, block(logits + place * U, start + lanes, start + lanes < size))
    maximum = tl.max(best, 0)
    shift = tl.where(maximum > float("-inf"), maximum, 0.0)
    for start in range(0, size, BLOCK):
        sums += tl.exp(block(logits + place * U, start + lanes, start + lanes < size) - shift)
    tl.store(maxima + place, maximum)
    tl.store(exp_sums + place, tl.sum(sums, 0))
