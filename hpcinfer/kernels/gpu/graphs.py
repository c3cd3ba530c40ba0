"""Decode batches from recordings: what a stage launches for one is recorded once, and launched as a whole from then on.

A batch is padded to the next size of a ladder by repeating its last token, whose row then comes out several times, and
whose K and V are written to the same place again, the same bits. A recording reads all integers from memory that never
moves (`FixedStep`). There is one for each size, and for each power of two of the splits of keys that attention has
programs for. Which one a batch takes depends on the batch alone: it is the same on all ranks.

Recordings share their memory, and one runs at a time, on the stream of everything else: what they give is copied before
the next one may begin.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from hpcinfer.errors import HpcInferError
from hpcinfer.kernels.gpu.plan import SPLIT, TILE, PlanKey
from hpcinfer.kernels.gpu.step import FixedStep, Steps
from hpcinfer.kernels.protocol import StepInput

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 513, 32))  # tokens of recorded batches
_MOST_ITEMS = 1 << 14  # of attention
_MOST_BLOCKS = 1 << 21  # of all sequences of a batch
_ROOM = _MOST_BLOCKS + (1 << 20)  # integers

Work = Callable[[StepInput, Tensor | None], Tensor]


class Graphs(Protocol):
    """Records what is launched."""

    def warm_up(self, run: Callable[[], Tensor]) -> Tensor:
        """Run something that is to be recorded later, so that all that it needs is set up."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what `run` launches, which does not happen now; what is returned launches it."""


class TorchGraphs:
    """CUDA graphs, or HIP graphs on AMD, which share their memory; it is good until all of them are gone."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], Tensor]) -> Tensor:
        """Run on the stream that records: libraries set up what they need for each stream."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            out = run()
        current.wait_stream(self._stream)
        return out

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Capture a graph; not by torch.cuda.graph, which first waits for the device: a dead rank's sum never ends.

        What is done besides launches, as for a first message between two GPUs, is done now: "relaxed" allows it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="relaxed")
            try:
                run()
            except BaseException:
                with suppress(RuntimeError):  # it is the first error that counts
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay


def graphs_of(device: torch.device) -> Callable[[], Graphs] | None:
    """Find what makes recorders of launches on a device; nothing does in the interpreter."""
    return partial(TorchGraphs, device) if device.type == "cuda" else None


class _Shape(NamedTuple):
    """What recordings differ in."""

    size: int  # tokens
    num_items: int  # of attention, that there is room for


class _Recording(NamedTuple):
    """One of them."""

    step: FixedStep
    launch: Callable[[], None]


def shape_of(step: StepInput) -> _Shape | None:
    """Choose the recording for a batch; None for one that is not all decoding, or too large."""
    num_tokens = len(step.positions)
    if num_tokens != len(step.context_lens) or not 0 < num_tokens <= SIZES[-1]:
        return None
    size = SIZES[bisect.bisect_left(SIZES, num_tokens)]
    splits = -(-step.context_lens // (TILE * SPLIT))
    # the programs for a repeated token may be so many that each has one
    most_items = int(splits.sum() + (size - num_tokens) * splits[-1])
    num_items = size if splits.max() == 1 else 2 * size
    while num_items < most_items:
        num_items *= 2
    return None if num_items > _MOST_ITEMS or len(step.block_tables) > _MOST_BLOCKS else _Shape(size, num_items)


def padded(step: StepInput, size: int) -> StepInput:
    """A decode batch whose last token is repeated, up to so many tokens."""
    query_starts = step.query_starts.copy()
    query_starts[-1] = size
    tokens = np.minimum(np.arange(size), len(step.positions) - 1)
    return replace(
        step, token_ids=step.token_ids[tokens], positions=step.positions[tokens], slots=step.slots[tokens],
        query_starts=query_starts,
    )  # fmt: skip


class Recorders:
    """Recordings of all stages, each kept as long as the stage lives.

    Args:
        make_graphs: makes what records a stage; None if nothing does.
        steps: knows the integers of the batches that run.
        device: of all arrays.
    """

    def __init__(self, make_graphs: Callable[[], Graphs] | None, steps: Steps, device: torch.device) -> None:
        self._make_graphs, self._steps, self._device = make_graphs, steps, device
        self._recorders: WeakKeyDictionary[object, Recorder] = WeakKeyDictionary()

    def run(self, step: StepInput, hidden: Tensor | None, work: Work, owner: object, *, is_alone: bool) -> Tensor:
        """work(step, hidden), recorded if it can be. See `Kernels.run_layers`."""
        shape = None if self._make_graphs is None else shape_of(step)
        if self._make_graphs is None or shape is None:
            return work(step, hidden)
        if owner not in self._recorders:
            self._recorders[owner] = Recorder(self._make_graphs(), self._steps, self._device)
        return self._recorders[owner].run(shape, step, hidden, work, is_alone=is_alone)


class Recorder:
    """Recordings of one stage.

    A shape runs as it is when it is met first, and is recorded when it is met again. Where recording fails, batches go
    on being padded: ranks that share a sum must agree in its size.

    Args:
        graphs: records.
        steps: knows the integers of the batches that run.
        device: of all arrays.
    """

    def __init__(self, graphs: Graphs, steps: Steps, device: torch.device) -> None:
        self._graphs, self._steps, self._device = graphs, steps, device
        self._keys: tuple[PlanKey, ...] = ()  # what attention is planned for
        self._width = 0  # of a row
        self._recordings: dict[_Shape, _Recording | None] = {}
        self._memory, self._rows = torch.empty(0), torch.empty(0)  # of integers; [T, D] of what goes in and comes out
        self._is_broken = False

    def run(self, shape: _Shape, step: StepInput, hidden: Tensor | None, work: Work, *, is_alone: bool) -> Tensor:
        """work(step, hidden), recorded or from a recording. See `Kernels.run_layers`."""
        batch, num_tokens = padded(step, shape.size), len(step.positions)
        if shape in self._recordings and not self._is_broken:
            recording = self._recordings[shape] or self._record(shape, batch, hidden is not None, work, is_alone)
            if recording is not None:
                return self._replay(recording, batch, hidden, num_tokens)
        self._recordings.setdefault(shape, None)
        self._steps.planned.clear()
        x = None if hidden is None else _padded_rows(hidden, shape.size)
        out = self._graphs.warm_up(lambda: work(batch, x))
        self._keys, self._width = tuple(self._steps.planned), out.shape[1]
        return out[:num_tokens]

    def _record(
        self, shape: _Shape, batch: StepInput, takes_hidden: bool, work: Work, is_alone: bool
    ) -> _Recording | None:
        try:
            recording = self._recorded(shape, batch, takes_hidden, work)
        except RuntimeError as error:
            if not is_alone:  # what the others have recorded waits for a recording of this rank
                hint = "--no-cuda-graphs, or a lower --kv-cache-memory"
                raise HpcInferError(f"a decode step could not be recorded: {error}", hint=hint) from error
            logger.warning("decode steps are not recorded, and wait for their launches: %s", error)
            self._is_broken = True
            return None
        self._recordings[shape] = recording
        return recording

    def _recorded(self, shape: _Shape, batch: StepInput, takes_hidden: bool, work: Work) -> _Recording:
        if not len(self._rows):
            self._memory = torch.zeros(_ROOM, dtype=torch.int32, device=self._device)
            self._rows = torch.zeros(SIZES[-1], self._width, device=self._device)
        fixed, rows = FixedStep(batch, self._keys, shape.num_items, self._memory), self._rows[: shape.size]

        def run() -> None:
            with self._steps.only(fixed):
                rows.copy_(work(batch, rows if takes_hidden else None))

        return _Recording(fixed, self._graphs.record(run))

    def _replay(self, recording: _Recording, batch: StepInput, hidden: Tensor | None, num_tokens: int) -> Tensor:
        recording.step.take(batch)
        if hidden is not None:
            self._rows[:num_tokens].copy_(hidden)
            self._rows[num_tokens : len(batch.positions)].copy_(hidden[-1])
        recording.launch()
        return self._rows[:num_tokens].clone()


def _padded_rows(x: Tensor, size: int) -> Tensor:
    """[T, D] with its last row repeated."""
    return x if len(x) == size else torch.cat([x, x[-1:].expand(size - len(x), -1)])
