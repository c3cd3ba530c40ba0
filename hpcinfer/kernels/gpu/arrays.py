"""Arrays of one GPU for those who move and add them: torch tensors, their addresses, and the current stream."""

import os
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hpcinfer.partition.tree_program import Add, TreeProgram

_SPIN_S, _NAP_S = 0.0003, 0.0001


class GpuArrays:
    """Contiguous tensors of one device; a CPU's do as well, where everything is done at once. Not collective."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._is_gpu = device, device.type == "cuda"
        self.gpu_id = _gpu_id(device)

    def bind(self) -> None:
        """Make this GPU the current one of the calling thread."""
        if self._is_gpu:
            torch.cuda.set_device(self._device)

    def owns(self, buffer: object) -> bool:
        """Whether this is a tensor of the device."""
        return isinstance(buffer, Tensor) and buffer.device.type == self._device.type

    def empty(self, length: int) -> Tensor:
        """Allocate float32, flat."""
        return torch.empty(length, device=self._device)

    def flat(self, array: Tensor) -> Tensor:
        """View as one dimension."""
        return array.view(-1)

    def num_bytes(self, array: Tensor) -> int:
        """Count the bytes of a tensor."""
        return array.numel() * array.element_size()

    def address(self, array: Tensor) -> int:
        """Say where a tensor begins."""
        return array.data_ptr()

    def stream(self) -> int:
        """Handle of the current stream."""
        return torch.cuda.current_stream(self._device).cuda_stream if self._is_gpu else 0

    def is_recording(self) -> bool:
        """Whether what is enqueued is recorded in a CUDA graph."""
        return self._is_gpu and torch.cuda.is_current_stream_capturing()

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Enqueue a copy; nothing if both are the same memory."""
        if source.data_ptr() != target.data_ptr():
            target.copy_(source)

    def evaluation(
        self, program: TreeProgram, nodes: Sequence[Sequence[Tensor]], outs: Sequence[Tensor]
    ) -> Callable[[], None]:
        """Prepare a program: a launch for all additions that can be done at once, and one for each result.

        Values between additions stand where their left operands did: in nodes.
        """
        values = [nodes[each.rank][each.node] for each in program.inputs]
        out_of = dict(zip(program.results, outs, strict=True))
        copies = [(values[value], out) for value, out in out_of.items() if value < len(values)]
        rounds, last = _rounds(program), []
        for value, (left, right) in enumerate(program.adds, len(values)):
            if value in out_of:
                last.append((values[left], values[right], out_of[value]))
            values.append(values[left])
        pairs = [([values[left] for left, _ in each], [values[right] for _, right in each]) for each in rounds]

        def run() -> None:
            for lefts, rights in pairs:
                torch._foreach_add_(lefts, rights)
            for left, right, target in last:
                torch.add(left, right, out=target)
            for source, target in copies:
                self.copy(source, target)

        return run

    def pinned(self, num_bytes: int) -> np.ndarray:
        """Allocate pinned bytes of the host."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_gpu).numpy()

    def to_host(self, source: Tensor, target: np.ndarray) -> None:
        """Enqueue a copy into pinned bytes."""
        torch.from_numpy(target).copy_(_as_bytes(source), non_blocking=True)

    def to_device(self, source: np.ndarray, target: Tensor) -> None:
        """Enqueue a copy of pinned bytes."""
        _as_bytes(target).copy_(torch.from_numpy(source), non_blocking=True)

    def mark(self) -> torch.cuda.Event | None:
        """Note what has been enqueued so far; None where everything is done at once."""
        if not self._is_gpu:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def is_reached(self, mark: torch.cuda.Event | None) -> bool:
        """Whether all that had been enqueued at a mark is done."""
        return mark is None or mark.query()

    def wait(self, check: Callable[[], None], mark: torch.cuda.Event | None = None) -> None:
        """Wait for a mark, or for all that has been enqueued; the core is given away, then the thread naps."""
        mark, start = self.mark() if mark is None else mark, time.monotonic()
        while not self.is_reached(mark):
            check()
            time.sleep(0 if time.monotonic() - start < _SPIN_S else _NAP_S)


def _rounds(program: TreeProgram) -> list[list[Add]]:
    """Additions whose sums are added again, those together that do not need one another."""
    depths, rounds = [0] * len(program.inputs), list[list[Add]]()
    for value, add in enumerate(program.adds, len(depths)):
        depths.append(1 + max(depths[operand] for operand in add))
        if value not in program.results:
            rounds += [[] for _ in range(depths[-1] - len(rounds))]
            rounds[depths[-1] - 1].append(add)
    return rounds


def _as_bytes(array: Tensor) -> Tensor:
    return array.view(-1).view(torch.uint8) if array.numel() else array.new_empty(0, dtype=torch.uint8)


def _gpu_id(device: torch.device) -> str:
    """Name the GPU, the same for all processes that use it, whatever numbers they give it."""
    if device.type != "cuda":
        return f"the memory of {os.uname().nodename}"
    found = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", os.environ.get("ROCR_VISIBLE_DEVICES", ""))
    return str(found) if found else f"{os.uname().nodename} {visible} {device.index}"
