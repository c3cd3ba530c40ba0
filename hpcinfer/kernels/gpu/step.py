"""The integers of one batch on the device: copied once, whatever the number of layers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpcinfer.kernels.gpu.plan import Plan, plan_items
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
        self._plans: dict[tuple[int, int, int], Plan] = {}

    def plan(self, group_size: int, window: int, rows: int) -> Plan:
        """Plan attention for layers with this window, in programs of some rows and heads."""
        key = (group_size, window, rows)
        if key not in self._plans:
            *arrays, num_partial = plan_items(self.step, *key)
            items, merged = to_device(arrays, self._device)
            self._plans[key] = Plan(items, merged, num_partial, rows)
        return self._plans[key]


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copy int32 arrays in one go, without waiting for the device."""
    starts = np.cumsum([0, *(-(-each.size // _ALIGNMENT) * _ALIGNMENT for each in arrays)])
    host = torch.empty(int(starts[-1]), dtype=torch.int32, pin_memory=device.type == "cuda")
    for start, each in zip(starts, arrays, strict=False):
        host.numpy()[start : start + each.size] = each.reshape(-1)
    there = host.to(device, non_blocking=True)
    return [there[start : start + each.size].view(each.shape) for start, each in zip(starts, arrays, strict=False)]
