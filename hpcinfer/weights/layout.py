"""From one tensor of Hugging Face's checkpoint to the units of one stored parameter, one unit at a time."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from hpcinfer.config import ModelConfig
from hpcinfer.dtypes import all_finite
from hpcinfer.errors import ModelError
from hpcinfer.weights.schema import WHOLE, ParamSpec, param_specs, source_name, unit_ranges
from hpcinfer.weights.source import Source


class Layout(NamedTuple):
    """How a parameter was cut."""

    full_shape: tuple[int, ...]  # of the checkpoint's tensor
    split_dim: int  # of the checkpoint's tensor; -1: not split
    ranges: list[range]  # what each unit holds of that dim, without padding


def layout(spec: ParamSpec, config: ModelConfig, grains: int) -> Layout:
    """Say how the checkpoint's tensor is cut into the units of a parameter. Not collective."""
    ranges = unit_ranges(config, spec.axis, grains)
    if spec.axis == WHOLE:
        return Layout(spec.shape[1:], -1, ranges)
    total = ranges[-1].stop
    if spec.name.endswith(("o_proj.weight", "down_proj.weight")):
        return Layout((spec.shape[1], total), 1, ranges)
    return Layout((total, *spec.shape[2:]), 0, ranges)


def num_weights(config: ModelConfig) -> int:
    """Count the values of a model's checkpoint. Not collective."""
    return sum(math.prod(layout(spec, config, 1).full_shape) for spec in param_specs(config, grains=1))


def read_units(source: Source, spec: ParamSpec, grains: int) -> Iterator[np.ndarray]:
    """Read, check and pad the units of a parameter, in order, each of shape `spec.shape[1:]`.

    Not collective. Holds one unit in memory, or the whole tensor where units are columns.

    Raises:
        ModelError: another shape than the config says, or NaN or infinity; names file and tensor.
    """
    name = source_name(spec.name)
    full_shape, split_dim, ranges = layout(spec, source.config, grains)
    if source.shape(name) != full_shape:
        raise ModelError(
            f"tensor {name} has the shape {source.shape(name)}",
            expected=f"{full_shape} as config.json says",
            where=str(source.path_of(name)),
        )
    whole = source.read(name) if split_dim != 0 else None
    for unit, held in enumerate(ranges):
        part = source.read(name, held) if whole is None else _cut(whole, split_dim, held)
        if not all_finite(part, source.dtype(name)):
            raise ModelError(
                f"tensor {name} holds NaN or infinity in unit {unit}",
                expected="finite values",
                where=str(source.path_of(name)),
                hint="fetch the file again; compare its hash",
            )
        yield _padded(part, spec.shape[1:])


def _cut(whole: np.ndarray, split_dim: int, held: range) -> np.ndarray:
    return whole if split_dim < 0 else whole[:, held.start : held.stop]


def _padded(part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if part.shape == shape:
        return np.ascontiguousarray(part)
    out = np.zeros(shape, part.dtype)
    out[tuple(slice(0, size) for size in part.shape)] = part
    return out
