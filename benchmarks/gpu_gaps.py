"""Where the time of decode steps goes on the device: kernels by name, and what is between them."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import NamedTuple

import torch
from gpu_bench import Bench, Row, UnavailableError
from gpu_decode import Served, random_prompts, serve
from gpu_engine import Way, greedy
from torch.profiler import ProfilerActivity, profile

_TOP = 12  # kernels that are named
_STEPS = 16  # that are looked at


class Span(NamedTuple):
    """Something that the device did."""

    start: float  # microseconds
    stop: float
    name: str = ""


class Busy(NamedTuple):
    """How much of a time the device worked."""

    busy: float  # microseconds in which at least one kernel ran
    total: float  # from the first to the last
    gaps: int  # times in between in which none ran


def run(bench: Bench) -> Iterator[Row]:
    """Give a row for some batches of the first shape, with graphs and without."""
    shape, *_ = bench.sizes.shapes
    for graphs in (True, False):
        yield from _profile(bench, shape, Way(graphs=graphs))


def _profile(bench: Bench, shape: str, way: Way) -> Iterator[Row]:
    batches, about = bench.sizes.decode.profiled, {"shape": shape, "precision": "bf16", **way._asdict()}
    if bench.device.type != "cuda":
        yield {**about, "skipped": "there are no kernels on a GPU to look at"}
        return
    served, failed = bench.obtain(about, serve, bench, bench.sizes.shapes[shape], "bf16", way, max(batches))
    yield from failed
    if served is not None:
        with closing(served.replica):
            for batch in batches:
                yield bench.attempt({**about, "batch": batch}, _measure, bench, served, batch)


def _measure(bench: Bench, served: Served, batch: int) -> Row:
    (model, replica), sampling = served, greedy(_STEPS)
    prompts = random_prompts(model.source.config.vocab_size, batch, 1)
    model.generate(replica, prompts, sampling)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        model.generate(replica, prompts, sampling)
        bench.wait()
    spans = [Span(event.time_range.start, event.time_range.end, event.name) for event in profiler.events()
             if event.device_type == torch.autograd.DeviceType.CUDA]  # fmt: skip
    if not spans:
        raise UnavailableError("the profiler saw nothing on the device")
    return between(spans)


def between(spans: list[Span]) -> Row:
    """What is between kernels, as part of the time, and which kernels there are."""
    seen = busy(spans)
    return {
        "between": 1 - seen.busy / seen.total, "gaps": seen.gaps, "events": len(spans), "total_us": seen.total,
        "top": [list(each) for each in top(spans)],
    }  # fmt: skip


def busy(spans: Iterable[Span]) -> Busy:
    """Add up the time in which at least one of them was there."""
    ordered = sorted(spans)
    first, until, total, gaps = ordered[0].start, ordered[0].start, 0.0, 0
    for each in ordered:
        gaps += each.start > until
        total += max(0.0, each.stop - max(each.start, until))
        until = max(until, each.stop)
    return Busy(total, until - first, gaps)


def top(spans: Iterable[Span]) -> list[tuple[str, float, int]]:
    """The names that took most: microseconds, and how often."""
    taken, count = Counter[str](), Counter[str]()
    for each in spans:
        taken[each.name] += each.stop - each.start  # type: ignore[assignment]
        count[each.name] += 1
    return [(name[:60], float(us), count[name]) for name, us in taken.most_common(_TOP)]
