"""One open HDF5 file of a store: HDF5 says where the chunks stand, `preadv` reads them."""

import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from hpcinfer.dtypes import STORAGE, raw_bytes
from hpcinfer.errors import StoreError
from hpcinfer.weights.safetensors_file import read_exactly
from hpcinfer.weights.schema import ParamSpec
from hpcinfer.weights.store_format import StoredParam


class Expected(NamedTuple):
    """What a dataset must look like, by the schema and the index."""

    spec: ParamSpec
    param: StoredParam


class StoreFile:
    """Chunk offsets of the datasets of one file, and the file itself while it is open."""

    def __init__(self, path: Path, datasets: Sequence[Expected]) -> None:
        """Open a file and check its datasets against what the index says.

        Not collective.

        Raises:
            StoreError: a missing, truncated or damaged file; a dataset that is missing or of another shape or type.
        """
        self.path = path
        with open_hdf5(path) as file:
            self._offsets = {item.spec.name: _chunk_offsets(file, path, item) for item in datasets}
        self._file: FileIO | None = None

    def close(self) -> None:
        """Close the file; the next read opens it again. Not collective."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def read_unit(self, item: Expected, unit: int, out: np.ndarray) -> None:
        """Fill a contiguous array with one unit and verify its checksum.

        Not collective.

        Raises:
            StoreError: too few bytes, or other bytes than were written.
        """
        offset, where = self._offsets[item.spec.name][unit], describe(self.path, item.param.dataset, unit)
        raw = raw_bytes(out)
        count = read_exactly(self._open().fileno(), raw, offset)
        if count != len(raw):
            raise StoreError(
                f"the file ends after {count} of {len(raw)} bytes of a chunk",
                expected="a whole file",
                where=where,
                hint="convert the model again",
            )
        checksum = zlib.crc32(raw)
        if checksum != item.param.checksums[unit]:
            raise StoreError(
                f"a chunk has the checksum {checksum:08x}",
                expected=f"{item.param.checksums[unit]:08x}, as when written",
                where=where,
                hint="convert the model again; check the disk if it happens twice",
            )

    def _open(self) -> FileIO:
        if self._file is None:
            try:
                self._file = FileIO(self.path)
            except OSError as error:
                reason = error.strerror or str(error)
                found = f"{self.path.name} cannot be opened any more: {reason}"
                raise StoreError(found, expected="all files of the store", where=str(self.path)) from error
        return self._file


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading; what HDF5 raises inside the block becomes a StoreError. Not collective."""
    if not path.is_file():
        raise StoreError(f"no {path.name}", expected="all files of the store", where=str(path))
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
    if name not in file or not isinstance(file[name], h5py.Dataset):
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
