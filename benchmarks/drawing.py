"""Microseconds per row of drawing ids from logits: the native kernels beside the shared definition, in turns.

    python benchmarks/drawing.py --threads 2 --rows 64

The definition (hpcinfer.kernels.sampling) is numpy, a row at a time; both choose the same ids, which is checked. Ends
with 1 if they do not. The spread of normal logits says how many ids hold 0.95 of the probability.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np

from hpcinfer.kernels import Placement, create_kernels
from hpcinfer.kernels.protocol import Draw
from hpcinfer.kernels.sampling import draw_rows

_SPREADS = (6.0, 2.5, 0.5)
_FILTERS = {
    "greedy": Draw(0.0), "temperature 1": Draw(1.0), "0.6, top_p 0.9": Draw(0.6, top_p=0.9),
    "1, top_p 0.95": Draw(1.0, top_p=0.95), "1, top_k 50": Draw(1.0, top_k=50),
}  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    kernels = create_kernels("native", placement=Placement(args.threads))
    random, grains = np.random.default_rng(0), 8
    sizes = (args.vocabulary // grains,) * grains
    print(f"{args.rows} rows of {sum(sizes)} ids, {args.threads} threads: median microseconds per row of {args.rounds}")
    print(f"{'spread':>6}  {'':<16}{'ids':>7}{'definition':>12}{'native':>8}{'ratio':>7}")
    is_right = True
    for spread in _SPREADS:
        logits = (random.standard_normal((args.rows, grains, sizes[0])) * spread).astype(np.float32)
        num_ids = _nucleus_size(logits[0].ravel(), 0.95)
        for name, draw in _FILTERS.items():
            draws = [draw._replace(u=float(u)) for u in random.random(args.rows)]
            ways = [partial(draw_rows, logits, sizes, draws, kernels), partial(kernels.draw, logits, sizes, draws)]
            is_right = is_right and ways[0]().tolist() == ways[1]().tolist()
            slow, fast = (1e6 * seconds / args.rows for seconds in _medians(ways, args.rounds))
            print(f"{spread:>6}  {name:<16}{num_ids:>7}{slow:>12.0f}{fast:>8.1f}{slow / fast:>7.1f}")
    sys.exit(not is_right)


def _nucleus_size(row: np.ndarray, top_p: float) -> int:
    """Ids that hold so much of the probability at temperature 1."""
    weights = np.sort(np.exp(row.astype(np.float64) - row.max()))[::-1]
    return int(np.searchsorted(np.cumsum(weights), top_p * weights.sum())) + 1


def _medians(ways: list[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds of each, called in turns."""
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, found in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            way()
            found.append(time.perf_counter() - start)
    return [median(found) for found in seconds]


if __name__ == "__main__":
    main()
