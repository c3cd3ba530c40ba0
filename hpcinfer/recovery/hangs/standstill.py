"""Standing still: what the threads of this process are at, and for how long nothing of it has changed.

Looked at from outside, through their stacks and what the system counts for them: whoever works, also in one long call,
uses its core or gets data. Nothing here reads the job directory, which may be what stands still.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from hpcinfer.report.metrics import IDLE, SPARE, WEIGHTS, Metrics

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_WORK_S = 0.05  # of a core: who used less since the last sign of progress did not compute
_MESSAGES = "hpcinfer.comm."  # here a thread waits for other ranks
_SUMS = "hpcinfer.comm.tree"  # except here
_QUEUES = ("threading", "queue")


class Kind(str, Enum):
    """What a rank or a thread is at."""

    MOVING = "moving"
    WAITING = "waiting"  # for other ranks
    IDLE = "idle"  # nothing to do until there is work
    SPARE = "spare"  # nothing to do unless a rank dies
    STUCK = "stuck"  # in something that should end by itself


class Usage(NamedTuple):
    """What the system has counted for a thread so far."""

    core_s: float
    num_calls: int  # that read or wrote
    num_faults: int  # pages that came from a file

    def has_worked_since(self, before: Usage) -> bool:
        """Whether there was progress."""
        return self.core_s - before.core_s >= _WORK_S or self[1:] != before[1:]


@dataclass
class Standing:
    """A thread, and for how long it has stood still."""

    name: str
    kind: Kind
    stack: tuple[str, ...] = ()  # innermost first
    still_s: float = 0.0
    _signature: tuple[object, ...] = field(default=(), repr=False)
    _usage: Usage = field(default=Usage(0.0, 0, 0), repr=False)

    def update(self, seen: Standing, elapsed_s: float) -> None:
        """Take over what was seen now; `elapsed_s` have passed since the last time."""
        is_same = self._signature == seen._signature and seen.kind is not Kind.MOVING
        if is_same and not (seen.kind is Kind.STUCK and seen._usage.has_worked_since(self._usage)):
            self.still_s += elapsed_s
        else:
            self.still_s, self._usage = 0.0, seen._usage
        self.kind, self.stack, self._signature = seen.kind, seen.stack, seen._signature


class Threads:
    """The threads of this process that matter: the main one, and those that are in our code."""

    def __init__(self, main: threading.Thread | None = None) -> None:
        self._main = main or threading.main_thread()
        self._metrics: list[Metrics] = []
        self.standings: dict[int, Standing] = {}  # by thread

    def follow(self, metrics: Metrics) -> None:
        """Take phases of these metrics as places, and as progress, of the main thread; the last ones say where."""
        self._metrics.append(metrics)

    @property
    def place(self) -> str:
        """Phase that the main thread is in."""
        return next((metrics.place for metrics in reversed(self._metrics) if metrics.place), "")

    @property
    def main(self) -> Standing:
        """The main thread."""
        return self.standings.get(self._main.ident or 0, Standing("MainThread", Kind.MOVING))

    def look(self, elapsed_s: float) -> None:
        """Look at all threads but the calling one. Not collective."""
        frames, standings = sys._current_frames(), dict[int, Standing]()
        for thread in threading.enumerate():
            frame = frames.get(thread.ident or 0)
            if frame is None or thread is threading.current_thread():
                continue
            seen = self._see(thread, frame)
            known = self.standings.get(thread.ident or 0, seen)
            known.update(seen, 0.0 if known is seen else elapsed_s)
            standings[thread.ident or 0] = known
        self.standings = standings

    def stands(self, limit_s: float) -> tuple[Kind, Standing]:
        """Say what this rank is at: a thread that is stuck for so long first, then the main thread."""
        main = self.main
        stuck = [each for each in self.standings.values() if each.kind is Kind.STUCK and each.still_s >= limit_s]
        if stuck:
            return Kind.STUCK, max(stuck, key=lambda each: each.still_s)
        return (main.kind if main.still_s >= limit_s else Kind.MOVING), main

    def _see(self, thread: threading.Thread, innermost: FrameType) -> Standing:
        frames = _frames(innermost)
        kind = self._main_kind(frames) if thread is self._main else _kind(frames)
        usage = read_usage(thread.native_id or 0) if kind is Kind.STUCK else Usage(0.0, 0, 0)
        moves = sum(metrics.moves for metrics in self._metrics) if thread is self._main else 0
        signature = (kind, moves, _positions(kind, frames))
        return Standing(thread.name, kind, tuple(map(_words, frames)), _signature=signature, _usage=usage)

    def _main_kind(self, frames: list[FrameType]) -> Kind:
        """The main thread has something to do, unless a phase says that it has not."""
        kind = {IDLE: Kind.IDLE, SPARE: Kind.SPARE, WEIGHTS: Kind.WAITING}.get(self.place, _kind(frames))
        return Kind.STUCK if kind is Kind.MOVING else kind


def read_usage(thread: int) -> Usage:
    """Read what the system has counted for a thread of this process; where it does not, for the whole process."""
    folder = Path(f"/proc/self/task/{thread}")
    try:
        fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
        core_s, num_faults = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S, int(fields[9])
    except OSError:
        return Usage(time.process_time(), 0, 0)
    try:
        counters = dict(line.split(b": ") for line in (folder / "io").read_bytes().splitlines())
    except OSError:  # not counted by this kernel
        return Usage(core_s, 0, num_faults)
    return Usage(core_s, int(counters[b"syscr"]) + int(counters[b"syscw"]), num_faults)


def _kind(frames: list[FrameType]) -> Kind:
    """What a thread is at if nothing of it changes; MOVING for one that waits to be given something."""
    ours = [frame for frame in frames if _module(frame).startswith("hpcinfer.")]
    is_loop = ours == frames[:1]  # the function of the thread itself, in a queue without Python frames or asleep
    if not ours or is_loop or _module(frames[0]) in _QUEUES:
        return Kind.MOVING
    return Kind.WAITING if _is_message(ours[0]) else Kind.STUCK


def _positions(kind: Kind, frames: list[FrameType]) -> tuple[tuple[int, int], ...]:
    """Where a thread stands; nothing of how it looks, again and again, whether it may go on."""
    if kind in (Kind.IDLE, Kind.SPARE):
        return ()
    return tuple((id(frame.f_code), frame.f_lasti) for frame in frames if not _is_message(frame))


def _is_message(frame: FrameType) -> bool:
    return _module(frame).startswith(_MESSAGES) and _module(frame) != _SUMS


def _frames(innermost: FrameType | None) -> list[FrameType]:
    frames = []
    while innermost is not None:
        frames.append(innermost)
        innermost = innermost.f_back
    return frames


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _words(frame: FrameType) -> str:
    """Where a frame stands; not its line of source, which would have to be read from a file."""
    return f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
