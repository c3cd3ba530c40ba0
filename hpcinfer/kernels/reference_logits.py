"""What the reference kernels do with logits. Nothing of it depends on the company of a row."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hpcinfer.kernels import reference_math as math
from hpcinfer.kernels.logarithm import log
from hpcinfer.kernels.protocol import Changes, GrainBest, GrainStats
from hpcinfer.kernels.sampling import RowSampling, change_row, compact


class ReferenceLogits(RowSampling):
    """The part of the reference kernels that is about logits."""

    def argmax(
        self, logits: Tensor | np.ndarray, grain_sizes: tuple[int, ...], changes: Mapping[int, Changes] | None = None
    ) -> GrainBest:
        """The largest true logit of each row."""
        rows = compact(np.asarray(logits), grain_sizes)
        if not rows.shape[1]:
            return GrainBest(np.full(len(rows), -np.inf, np.float32), np.zeros(len(rows), np.int64))
        for i, change in (changes or {}).items():
            change_row(rows[i], change)
        rows[np.isnan(rows)] = -np.inf
        places = rows.argmax(axis=1)
        return GrainBest(rows[np.arange(len(rows)), places], places)

    def largest(self, row: np.ndarray, count: int) -> np.ndarray:
        """Places of the largest values: value descending, place ascending."""
        return np.argsort(-row, kind="stable")[:count]

    def grain_stats(self, logits: Tensor | np.ndarray, grain_sizes: tuple[int, ...]) -> GrainStats:
        """Maximum and exp-sum of logits [R, G, U] per grain."""
        logits, values = np.asarray(logits), torch.full(logits.shape, -torch.inf)
        for grain, size in enumerate(grain_sizes):
            values.numpy()[:, grain, :size] = logits[:, grain, :size]
        maxima = values.amax(2)
        values.sub_(maxima.masked_fill(maxima == -torch.inf, 0).unsqueeze(2))
        return GrainStats(maxima.numpy(), math.tree_sum_(math.exp_(values)).numpy().copy())

    def log(self, x: np.ndarray) -> np.ndarray:
        """Natural logarithm, computed in float64, in the precision of x."""
        return log(x).astype(x.dtype, copy=False)

    def exp(self, x: np.ndarray) -> np.ndarray:
        """Exponential in float32."""
        return math.exp_(torch.from_numpy(np.array(x, np.float32, order="C"))).numpy()
