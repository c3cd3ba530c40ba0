"""What this machine can do at most: float32 and int8 products, and reading memory; needs torch.

    python benchmarks/roofline.py --threads 1,2 --json roofline.json

Each figure is the best of several shapes and libraries: a bound that was reached, so a program may still pass it.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

_SIZES = (1024, 2048)  # of square matrices
Library = Callable[[int], Callable[[], object]]  # makes a product of square matrices of a size
_WORDS = 1 << 27  # float32 values that are read: 512 MiB, more than a cache holds


class Peaks(NamedTuple):
    """Best rates of a number of threads, per second."""

    f32: float  # operations
    int8: float  # operations
    read: float  # bytes


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", default=",".join(map(str, range(1, cores + 1))), help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.25, help="for each candidate (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    peaks = {int(text): measure(int(text), args.seconds) for text in args.threads.split(",")}
    print("threads  f32 GFLOP/s  int8 GOP/s  read GB/s")
    for threads, peak in peaks.items():
        print(f"{threads:>7} {peak.f32 / 1e9:>12.0f} {peak.int8 / 1e9:>11.0f} {peak.read / 1e9:>10.1f}")
    if args.json:
        args.json.write_text(json.dumps({threads: peak._asdict() for threads, peak in peaks.items()}))


def measure(threads: int, seconds: float) -> Peaks:
    """Measure with a number of threads, for so many seconds for each candidate."""
    torch.set_num_threads(threads)
    words = torch.ones(_WORDS)

    with torch.inference_mode():
        f32, int8 = (_best_rate(libraries, seconds) for libraries in (_products_f32(), _products_int8()))
        return Peaks(f32, int8, words.nbytes / min(_shortest(work, seconds) for work in _reads(words)))


def _best_rate(libraries: Iterator[Library], seconds: float) -> float:
    """Operations per second of the best library, at its best size."""
    best = 0.0
    for library in libraries:
        for size in _SIZES:
            rate = 2 * size**3 / _shortest(library(size), seconds)
            best = max(best, rate)
            if rate < best / 4:  # hopeless, and larger products would take long
                break
    return best


def _shortest(work: Callable[[], object], seconds: float) -> float:
    """Seconds of the quickest of several calls; of the first one, if that took far longer than all were to take."""
    start = time.perf_counter()
    work()
    shortest = time.perf_counter() - start
    end = start + shortest + seconds
    if shortest > 4 * seconds:
        return shortest
    while (start := time.perf_counter()) < end:
        work()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest


def _products_f32() -> Iterator[Library]:
    def operands(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(size, size), torch.randn(size, size)

    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # oneDNN
        linear = torch.ops.mkldnn._linear_pointwise
        yield lambda size: partial(linear, *operands(size), None, "none", [], "")
    yield lambda size: partial(torch.mm, *operands(size))  # MKL, which is slow on CPUs of other makers


def _products_int8() -> Iterator[Library]:
    if hasattr(torch.ops.onednn, "qlinear_pointwise"):
        yield _quantised_linear
    yield lambda size: partial(torch._int_mm, *[torch.randint(-128, 127, (size, size), dtype=torch.int8)] * 2)


def _quantised_linear(size: int) -> Callable[[], object]:
    """Bytes without a sign times signed ones, as oneDNN prefers them."""
    weight = torch.ops.onednn.qlinear_prepack(torch.randint(-128, 127, (size, size), dtype=torch.int8), None)
    ones, zeros = torch.ones(size), torch.zeros(size, dtype=torch.int32)
    rows = torch.randint(0, 255, (size, size), dtype=torch.uint8)
    rest = (weight, ones, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    return partial(torch.ops.onednn.qlinear_pointwise, rows, 1.0, 0, *rest)


def _reads(words: torch.Tensor) -> Iterator[Callable[[], object]]:
    matrix, vector = words.view(-1, 4096), torch.ones(4096)
    yield lambda: torch.mv(matrix, vector)
    yield lambda: torch.sum(words)


if __name__ == "__main__":
    main()
