"""What this machine can do at most: float32 and int8 products, and reading memory; needs torch.

    python benchmarks/roofline.py --threads 1,2 --json roofline.json

Each figure is the best of several shapes and libraries: a bound that was reached, so a program may still pass it.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

_SIZES = (1024, 2048)  # of square matrices
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

    def best(candidates: Iterator[Callable[[], object]]) -> float:
        return min(_shortest(work, seconds) for work in candidates)

    with torch.inference_mode():
        f32 = max(2 * size**3 / best(_products_f32(size)) for size in _SIZES)
        int8 = max(2 * size**3 / best(_products_int8(size)) for size in _SIZES)
        return Peaks(f32, int8, words.nbytes / best(_reads(words)))


def _shortest(work: Callable[[], object], seconds: float) -> float:
    work()
    shortest, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        work()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest


def _products_f32(size: int) -> Iterator[Callable[[], object]]:
    a, b = torch.randn(size, size), torch.randn(size, size)
    yield lambda: torch.mm(a, b)  # MKL, which is slow on CPUs of other makers
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        yield lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")  # oneDNN


def _products_int8(size: int) -> Iterator[Callable[[], object]]:
    a = torch.randint(-128, 127, (size, size), dtype=torch.int8)
    yield lambda: torch._int_mm(a, a)  # slow on CPUs without instructions for it
    if hasattr(torch.ops.onednn, "qlinear_pointwise"):
        weight = torch.ops.onednn.qlinear_prepack(a, None)
        ones, zeros = torch.ones(size), torch.zeros(size, dtype=torch.int32)
        rows = torch.randint(0, 255, (size, size), dtype=torch.uint8)
        yield lambda: torch.ops.onednn.qlinear_pointwise(
            rows, 1.0, 0, weight, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )


def _reads(words: torch.Tensor) -> Iterator[Callable[[], object]]:
    matrix, vector = words.view(-1, 4096), torch.ones(4096)
    yield lambda: torch.mv(matrix, vector)
    yield lambda: torch.sum(words)


if __name__ == "__main__":
    main()
