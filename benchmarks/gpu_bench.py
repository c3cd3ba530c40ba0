"""What all parts of the GPU benchmark share: the device, the time that is left, rows that may be left out, clocks."""

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch
from gpu_sizes import Sizes

from hpcinfer.errors import ConfigError
from hpcinfer.report.energy import open_meter

Row = dict[str, Any]


class UnavailableError(Exception):
    """Something cannot be measured here; the message says why."""


_REASONS = (UnavailableError, ConfigError, ImportError, MemoryError, torch.OutOfMemoryError)


class Part(Protocol):
    """A module of the benchmark."""

    def run(self, bench: "Bench") -> Iterator[Row]:
        """Measure, row by row."""


@dataclass(frozen=True)
class Bench:
    """Where and what is measured."""

    device: torch.device
    sizes: Sizes
    precisions: tuple[str, ...]  # of weights
    rounds: int
    folder: Path  # for files; the part's own
    end: float  # of the part's time, by time.monotonic
    store: Path | None = None  # to be loaded, instead of one of random weights

    def attempt(self, row: Row, work: Callable[..., Row], *args: Any) -> Row:
        """Give one row with what was measured, or with the reason why it is left out, or broke.

        Raises:
            RuntimeError: the device itself is broken, as after a wrong access: nothing after it could be measured.
        """
        self.free_memory()
        try:
            if self.is_over:
                raise UnavailableError("the time of this part is over")
            found = work(*args)
        except _REASONS as error:
            found = {"skipped": first_line(error)}
        except Exception as error:
            traceback.print_exc()
            found = {"failed": first_line(error)}
            self.wait()
        return {**row, **found}

    def obtain(self, row: Row, make: Callable[..., Any], *args: Any) -> "Obtained":
        """Make what several rows need; without it there is one row, with the reason."""
        made: list[Any] = []

        def work() -> Row:
            made.append(make(*args))
            return {}

        failed = self.attempt(row, work)
        return Obtained(made[0], []) if made else Obtained(None, [failed])

    @property
    def is_over(self) -> bool:
        """Whether the part's time is over."""
        return time.monotonic() > self.end

    def free_memory(self) -> None:
        """Give back to the device what nobody holds any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Median of what a piece of device work takes, by the device's clock, after a first run that does not count."""
        work()
        self.wait()
        taken: list[float] = []
        end = time.perf_counter() + self.sizes.measured_s
        while len(taken) < 3 or time.perf_counter() < end:
            taken.append(self._once(work))
        return median(taken)

    def _once(self, work: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


class Obtained(NamedTuple):
    """What was to be made, or why it was not."""

    value: Any | None
    rows: list[Row]


def first_line(error: BaseException) -> str:
    """Say what an error is in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def log(text: str) -> None:
    """Say how far it is, on standard error."""
    print(text, file=sys.stderr, flush=True)


class Energy:
    """Joules of the device, once it is closed; None where nothing counts them."""

    joules: float | None = None


@contextmanager
def energy(device: torch.device) -> Iterator[Energy]:
    """Count the energy of the device while a block runs."""
    found, meter = Energy(), open_meter(powercap=Path(os.devnull))  # GPUs alone
    yield found
    parts = meter.stop()["parts"]
    found.joules = parts.get(f"GPU {_physical_index(device)}") if len(parts) != 1 else next(iter(parts.values()))


def _physical_index(device: torch.device) -> int:
    """Number of a device among all of the node, where $CUDA_VISIBLE_DEVICES names numbers."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    index = device.index or 0
    return int(names[index]) if index < len(names) and names[index].isdigit() else index
