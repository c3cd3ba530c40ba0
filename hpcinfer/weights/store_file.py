"""One HDF5 file of a store: HDF5 is asked where the chunks stand, once; it reads none of them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpcinfer.dtypes import STORAGE, raw_bytes
from hpcinfer.errors import StoreError
from hpcinfer.weights.requests import Chunk
from hpcinfer.weights.schema import ParamSpec
from hpcinfer.weights.store_format import StoredParam

if TYPE_CHECKING:
    import h5py

Places = Mapping[str, Sequence[int]]  # by parameter: the offset of each unit's chunk in its file


class Expected(NamedTuple):
    """What a dataset must look like, by the schema and the index."""

    spec: ParamSpec
    param: StoredParam


class StoreFile:
    """Where the chunks of one file's datasets stand."""

    def __init__(self, path: Path, places: Places) -> None:
        self.path, self.places = path, places

    def chunk(self, item: Expected, unit: int, out: np.ndarray) -> Chunk:
        """Say where a unit stands that is to fill a contiguous array. Not collective."""
        start, checksum = self.places[item.spec.name][unit], item.param.checksums[unit]
        return Chunk(self.path, start, raw_bytes(out), checksum)


def find_places(path: Path, datasets: Sequence[Expected]) -> Places:
    """Check a file's datasets against what the index says, and find their chunks.

    Not collective.

    Raises:
        StoreError: a missing, truncated or damaged file; a dataset that is missing or of another shape or type.
    """
    with open_hdf5(path) as file:
        return {item.spec.name: _chunk_offsets(file, path, item) for item in datasets}


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading; what HDF5 raises inside the block becomes a StoreError. Not collective."""
    if not path.is_file():
        raise StoreError(f"no {path.name}", expected="all files of the store", where=str(path))
    import h5py  # some sixty files: only ranks that ask HDF5 something import it

    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, AttributeError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise StoreError(
            f"{path.name} is truncated, damaged or no HDF5 file: {reason}",
            expected="an HDF5 file as it was written",
            where=str(path),
            hint="convert the model again",
        ) from error


def describe(path: Path, dataset: str, unit: int | None = None) -> str:
    """Name a place in a store. Not collective."""
    return f"{path}, dataset {dataset}" + ("" if unit is None else f", chunk {unit}")


def _chunk_offsets(file: h5py.File, path: Path, item: Expected) -> list[int]:
    name, spec = item.param.dataset, item.spec
    if name not in file or not hasattr(file[name], "chunks"):
        raise StoreError(f"no dataset {name}", expected=f"one of shape {spec.shape}", where=describe(path, name))
    dataset, chunk = file[name], (1, *spec.shape[1:])
    found = (dataset.shape, dataset.dtype, dataset.chunks)
    expected = (spec.shape, STORAGE[item.param.dtype], chunk)
    if found != expected or dataset.compression or dataset.fletcher32 or dataset.shuffle:
        raise StoreError(
            f"a dataset of {_text(*found)}",
            expected=f"{_text(*expected)}, unfiltered",
            where=describe(path, name),
            hint="convert the model again",
        )
    size = os.stat(path).st_size
    return [
        _chunk_offset(dataset, path, name, unit, math.prod(chunk) * dataset.dtype.itemsize, size)
        for unit in range(spec.shape[0])
    ]


def _chunk_offset(dataset: h5py.Dataset, path: Path, name: str, unit: int, num_bytes: int, file_size: int) -> int:
    info = dataset.id.get_chunk_info_by_coord((unit, *(0,) * (dataset.ndim - 1)))
    if info.byte_offset is None or info.size != num_bytes or info.byte_offset + num_bytes > file_size:
        raise StoreError(
            f"a chunk of {info.size} bytes at {info.byte_offset} of a file of {file_size} bytes",
            expected=f"{num_bytes} bytes inside the file",
            where=describe(path, name, unit),
            hint="convert the model again",
        )
    return int(info.byte_offset)


def _text(shape: tuple[int, ...], dtype: np.dtype, chunks: tuple[int, ...]) -> str:
    return f"shape {shape}, type {dtype}, chunks {chunks}"
