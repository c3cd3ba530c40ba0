"""Where parameters lie in a prepared weight, so that they can be given back."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from hpcinfer.kernels.protocol import Weight


class Part(NamedTuple):
    """Where a parameter lies in a prepared weight."""

    weight: Any
    outs: int  # of a unit
    first_out: int = 0
    is_row: bool = False  # row-parallel: a unit is a grain


def side_by_side(prepared: Any, names: Sequence[str], weights: Sequence[Weight]) -> dict[str, Part]:
    """Where column-parallel weights lie in a prepared one."""
    parts, first = {}, 0
    for name, weight in zip(names, weights, strict=True):
        units, outs = weight.values.shape[:2]
        parts[name] = Part(prepared, outs, first)
        first += units * outs
    return parts
