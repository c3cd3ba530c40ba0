"""The integers of one batch on the device: copied once, whatever the number of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpcinfer.kernels.gpu.plan import Items, Plan, PlanKey, plan_items
from hpcinfer.kernels.protocol import StepInput

_ALIGNMENT = 4  # integers: every array begins at a multiple of 16 bytes


class Places(NamedTuple):
    """Where tokens stand, int32."""

    positions: Tensor  # [T]
    slots: Tensor  # [T]
    block_tables: Tensor


class DeviceStep:
    """One batch, as a device knows it."""

    def __init__(self, step: StepInput, device: torch.device) -> None:
        self.step, self._device = step, device
        arrays = (step.positions, step.slots, step.block_tables)
        self.places = Places(*to_device([each.astype(np.int32) for each in arrays], device))
        self._plans: dict[PlanKey, Plan] = {}

    def plan(self, key: PlanKey) -> Plan:
        """Plan attention."""
        if key not in self._plans:
            found = plan_items(self.step, key)
            items, merged = to_device([found.items, found.merged], self._device)
            self._plans[key] = Plan(items, merged, found.num_partial, key.rows)
        return self._plans[key]


class FixedStep:
    """Batches of one size, one after another, in memory that never moves: what was recorded of one holds for all.

    Args:
        step: one of them; of its numbers only their count is used.
        keys: all that attention will be planned for.
        num_items: items of a plan, and rows of parts for each head of a program, that there is room for; if it is no
            more than there are tokens, nothing is merged.
        memory: int32, for all numbers.
    """

    def __init__(self, step: StepInput, keys: Sequence[PlanKey], num_items: int, memory: Tensor) -> None:
        self.step, self._memory, size = step, memory, len(step.positions)
        num_merged = size if num_items > size else 0
        shapes = [(size,)] * 3 + [(num_items, 7), (num_merged, 4)] * len(keys)
        *self._starts, first = _starts([int(np.prod(shape)) for shape in shapes])
        views = [memory[start : start + int(np.prod(shape))].view(shape)
                 for start, shape in zip(self._starts, shapes, strict=True)]  # fmt: skip
        self.token_ids, self.places = views[0], Places(views[1], views[2], memory[first:])
        self._starts.append(first)
        self._plans = {
            key: Plan(views[3 + 2 * i], views[4 + 2 * i], num_items * key.group_size if num_merged else 0, key.rows)
            for i, key in enumerate(keys)
        }

    def plan(self, key: PlanKey) -> Plan:
        """Give the plan of attention."""
        return self._plans[key]

    def take(self, step: StepInput) -> None:
        """Let the memory have the numbers of another batch of this size, by one copy."""
        arrays: list[np.ndarray] = [step.token_ids, step.positions, step.slots]
        for key, plan in self._plans.items():
            found = plan_items(step, key)
            assert _has_room(plan, found), f"{plan = } {found = }"
            arrays += found.items, found.merged
        arrays.append(step.block_tables)
        size = self._starts[-1] + step.block_tables.size
        assert size <= len(self._memory), f"{size = } {len(self._memory) = }"
        host = _on_host(arrays, self._starts, size, self._memory.device)
        self._memory[:size].copy_(host, non_blocking=True)


class Steps:
    """The last batches that a device has met: halves of one take turns.

    Args:
        make: copies the integers of a batch.
    """

    def __init__(self, make: Callable[[StepInput], DeviceStep]) -> None:
        self._make = make
        self._known: tuple[DeviceStep, ...] = ()
        self._fixed: FixedStep | None = None
        self.planned: dict[PlanKey, None] = {}  # what attention was planned for, in order

    def find(self, step: StepInput) -> DeviceStep | FixedStep:
        """Give the integers of a batch, which are copied if it is new.

        Raises:
            RuntimeError: another batch than the one that is being recorded.
        """
        if self._fixed is not None:
            return self._check(self._fixed.step is step)
        for each in self._known:
            if each.step is step:
                return each
        there = self._make(step)
        self._known = (there, *self._known[:1])
        return there

    def plan(self, step: StepInput, key: PlanKey) -> Plan:
        """Plan attention over a batch."""
        self.planned[key] = None
        return self.find(step).plan(key)

    def token_ids(self, token_ids: np.ndarray, device: torch.device) -> Tensor:
        """Give the token ids of a batch."""
        if self._fixed is not None:
            return self._check(self._fixed.step.token_ids is token_ids).token_ids
        return to_device([token_ids.astype(np.int32)], device)[0]

    @contextmanager
    def only(self, fixed: FixedStep) -> Iterator[None]:
        """Know no other batch meanwhile: numbers of another one would be recorded as they are now."""
        self._fixed = fixed
        try:
            yield
        finally:
            self._fixed = None

    def _check(self, is_fixed: bool) -> FixedStep:
        if self._fixed is None or not is_fixed:
            raise RuntimeError("a batch that is not the one that is being recorded")
        return self._fixed


def rows_of_ids(starts: Sequence[int], sizes: Sequence[int], units: int) -> np.ndarray:
    """Rows of a vocabulary table whose grains have some units each: int32, by id, -1 for those that are not there.

    The last one stands for all ids that are larger."""
    rows = np.full(max(start + size for start, size in zip(starts, sizes, strict=True)) + 1, -1, np.int32)
    for grain, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        rows[start : start + size] = np.arange(size) + grain * units
    return rows


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copy int32 arrays in one go, without waiting for the device."""
    *starts, size = _starts([each.size for each in arrays])
    there = _on_host(arrays, starts, size, device).to(device, non_blocking=True)
    return [there[start : start + each.size].view(each.shape) for start, each in zip(starts, arrays, strict=True)]


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where arrays of these sizes begin, one after another, and where the last one ends."""
    return [int(start) for start in np.cumsum([0, *(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)])]


def _on_host(arrays: Sequence[np.ndarray], starts: Sequence[int], size: int, device: torch.device) -> Tensor:
    """Arrays as int32, in memory from which copies to the device need not be waited for; zeros between them."""
    host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
    for start, each in zip(starts, arrays, strict=True):
        host.numpy()[start : start + each.size] = each.reshape(-1)
    return host


def _has_room(plan: Plan, found: Items) -> bool:
    return (
        len(found.items) <= len(plan.items)
        and len(found.merged) <= len(plan.merged)
        and found.num_partial <= plan.num_partial
    )
