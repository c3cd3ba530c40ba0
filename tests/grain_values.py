"""Values of grains whose float32 sum depends on the order, and their sums along the tree."""

from operator import add

import numpy as np

from hpcinfer.partition.grains import Span, subtrees, tree_reduce


def values_of(grains: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Numbers of many sizes: float32 [grains, *shape]."""
    random = np.random.default_rng(seed)
    exponents = random.integers(-6, 7, (grains, *shape))
    return (random.standard_normal((grains, *shape)) * 10.0**exponents).astype(np.float32)


def own_nodes(values: np.ndarray, run: range) -> list[np.ndarray]:
    """Nodes of the tree that a rank holds who has this run of grains."""
    leaves = {Span(grain, grain + 1): values[grain] for grain in run}
    return [tree_reduce(leaves, Span(*span), add) for span in subtrees(run)]


def tree_sum(values: np.ndarray) -> bytes:
    """Bits of the root."""
    (root,) = own_nodes(values, range(len(values)))
    return root.tobytes()
