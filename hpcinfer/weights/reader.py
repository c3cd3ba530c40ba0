"""Reading a store: the index at once, of the other files only the units that are asked for."""

import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from hpcinfer.dtypes import SCALES, STORAGE, raw_bytes
from hpcinfer.errors import StoreError
from hpcinfer.weights.parallel_reads import Damage, ParallelReader
from hpcinfer.weights.requests import Chunk, aligned_empty, plain_empty
from hpcinfer.weights.schema import UNQUANTISED, ParamSpec, scale_name, stored_specs
from hpcinfer.weights.stage import Stage
from hpcinfer.weights.store_file import Expected, Places, StoreFile, describe, find_places
from hpcinfer.weights.store_format import INDEX_FILE
from hpcinfer.weights.store_index import StoreIndex, read_index

_PORTION_BYTES = 256 << 20  # that are read at once where a store is read whole


class StoredArray(NamedTuple):
    """Units of a parameter as stored (see `hpcinfer.dtypes`)."""

    values: np.ndarray  # [units, ...], own memory
    dtype: str  # a key of hpcinfer.dtypes.STORAGE


class StoredWeight(NamedTuple):
    """Units of a weight as stored; see `hpcinfer.dtypes.dequantise`."""

    values: np.ndarray  # [units, O, I], int4 [units, O, padded inputs / 2]
    dtype: str
    scales: np.ndarray | None  # of quantised ones


class UnitRead(NamedTuple):
    """One unit that is wanted, and where."""

    name: str  # of the parameter
    unit: int
    out: np.ndarray  # C-contiguous, of the unit's size; see `Store.empty`


class Store:
    """An open store, which several threads may read at once.

    Where the chunks of a file stand is kept: a rank that reads again, in a recovery, asks HDF5 no more.

    Requests leave what they read in the page cache, for other steps and jobs of the node, unless there is a stage for
    that, or memory cannot hold the store beside the weights.
    """

    def __init__(self, path: Path, index: StoreIndex, stage: str | None = None) -> None:
        self.path = path
        self.config = index.config
        self.grains = index.grains
        self.quantization: str = index.quantization.get("weights", UNQUANTISED)  # none, int8, fp8 or int4
        self.calibration: dict[str, Any] | None = index.quantization.get("calibration")
        self.digest = index.digest  # of the whole content: equal for equal models
        self.tokenizer_files = index.tokenizer_files  # by name: tokenizer.json, tokenizer_config.json, ...
        self.parameters = index.parameters  # by name, in the order of `stored_specs`
        self.source_files = index.source_files  # name, size and sha256 of what was converted
        self.hpcinfer_version = index.attributes["hpcinfer_version"]
        self.bytes_read = 0  # asked of the store's file system for units, so far
        self._specs = {spec.name: spec for spec in stored_specs(index.config, index.grains, self.quantization)}
        self._files: dict[str, StoreFile] = {}  # that have been read, by name
        self.bytes_from_stage = 0  # asked of the stage, so far
        self.allocate = plain_empty  # memory that is read into: `Kernels.staging` where a device is to have it
        self._reader = ParallelReader()
        sizes = {name: self._unit_bytes(name) for name in self._specs} if stage else {}
        self._stage = Stage(Path(stage), self.digest, self.parameters, sizes) if stage else None
        is_staged = self._stage is not None and self._stage.is_open
        self.direct = is_staged or self.num_bytes > _physical_memory() // 2  # requests go past the page cache
        self._lock = threading.Lock()

    @staticmethod
    def open(path: Path, stage: str | None = None) -> "Store":
        """Open a store; reads the index only.

        Not collective.

        Args:
            path: of the store.
            stage: folder on the node's own disk for copies of what is read; read instead of the store where they are.

        Raises:
            StoreError: no store, another format version, or a damaged index.
        """
        return Store(Path(path), read_index(Path(path)), stage)

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; the next read opens them again. Not collective."""
        self._reader.close()

    @property
    def num_bytes(self) -> int:
        """Size of all units."""
        return sum(len(param.checksums) * self._unit_bytes(name) for name, param in self.parameters.items())

    @property
    def dtype(self) -> str:
        """Element type of the embedding, which stands for the model's."""
        return self.parameters["embed_tokens.weight"].dtype

    def spec(self, name: str) -> ParamSpec:
        """Stored shape of a parameter. Not collective."""
        return self._specs[name]

    def read(self, name: str, units: range | None = None) -> StoredArray:
        """Read some units of a parameter, all if `units` is None; only their bytes are touched.

        Not collective.

        Raises:
            StoreError: a missing, truncated or damaged file; names file, dataset and chunk.
        """
        units = range(self._specs[name].shape[0]) if units is None else units
        values = self.empty(name, len(units))
        self.read_into(_unit_reads(name, units, values))
        return StoredArray(values, self.parameters[name].dtype)

    def read_weight(self, name: str, units: range | None = None) -> StoredWeight:
        """Read some units of a weight with their scales, if it has any. See `read`.

        Not collective.
        """
        dtype = self.parameters[name].dtype
        if dtype not in SCALES:
            return StoredWeight(*self.read(name, units), None)
        units = range(self._specs[name].shape[0]) if units is None else units
        values, scales = self.empty(name, len(units)), self.empty(scale_name(name), len(units))
        self.read_into([*_unit_reads(name, units, values), *_unit_reads(scale_name(name), units, scales)])
        return StoredWeight(values, dtype, scales)

    def read_into(self, wanted: Sequence[UnitRead], *, is_shared: bool = False) -> None:
        """Read units of any parameters into memory of the caller; large requests, several at a time, in file order.

        Not collective. Returns when no thread writes into that memory any more.

        Args:
            wanted: units, and where they go.
            is_shared: whether others may use that memory already: then no copy of this node, which may be damaged, is
                read into it.

        Raises:
            StoreError: a missing, truncated or damaged file; names the first file, dataset and chunk.
        """
        for each in wanted:
            self._check(each)
        missing = wanted if self._stage is None or is_shared else self._read_staged(wanted)
        self._read_store(missing)
        for each in missing:
            self.keep(*each)

    @property
    def has_stage(self) -> bool:
        """Whether copies of units are kept on this node."""
        return self._stage is not None

    def has_staged(self, name: str, unit: int) -> bool:
        """Whether a copy of a unit is said to be on this node. Not collective."""
        return self._stage is not None and self._stage.has(name, unit)

    def keep(self, name: str, unit: int, values: np.ndarray) -> None:
        """Have a unit staged that came from another rank; `read_into` does it itself. Nothing without a stage.

        Not collective. The memory is free again on return.
        """
        if self._stage is not None:
            self._stage.keep(name, unit, raw_bytes(values))

    def flush_stage(self) -> None:
        """Wait until what was read is staged, as far as it can be. Not collective."""
        if self._stage is not None:
            self._stage.flush()

    def empty(self, name: str, num_units: int) -> np.ndarray:
        """Make uninitialised memory for units of a parameter, [units, ...], where requests need no copy.

        Not collective.
        """
        shape, dtype = (num_units, *self._specs[name].shape[1:]), STORAGE[self.parameters[name].dtype]
        return aligned_empty(shape, dtype, self.allocate)

    def verify(self) -> None:
        """Read everything once and compare all checksums.

        Not collective.

        Raises:
            StoreError: the first damage found.
        """
        portion, size = list[UnitRead](), 0
        for name, spec in self._specs.items():
            for unit in range(spec.shape[0]):
                portion.append(UnitRead(name, unit, self.empty(name, 1)[0]))
                size += portion[-1].out.nbytes
                if size >= _PORTION_BYTES:
                    self._read_store(portion)
                    portion, size = [], 0
        self._read_store(portion)

    @property
    def file_names(self) -> list[str]:
        """Files of weights, in the order of the parameters."""
        return list(dict.fromkeys(param.file for param in self.parameters.values()))

    def places(self, file_name: str) -> Places:
        """Say where the chunks of a file stand; asks HDF5, unless that is known. Not collective.

        Raises:
            StoreError: a missing, truncated or damaged file.
        """
        return self._file(file_name).places

    def learn(self, file_name: str, places: Places) -> None:
        """Take another rank's word for where the chunks of a file stand. Not collective."""
        with self._lock:
            self._files[file_name] = StoreFile(self.path / file_name, places)

    def _check(self, wanted: UnitRead) -> None:
        """Refuse what would read or write beside a unit."""
        num_units, num_bytes = self._specs[wanted.name].shape[0], self._unit_bytes(wanted.name)
        if not 0 <= wanted.unit < num_units:
            raise IndexError(f"unit {wanted.unit} of {wanted.name}: there are {num_units}")
        if wanted.out.nbytes != num_bytes:
            raise ValueError(f"{wanted.out.nbytes} bytes for a unit of {wanted.name}: expected {num_bytes}")

    def _read_staged(self, wanted: Sequence[UnitRead]) -> list[UnitRead]:
        """Fill what is staged; returns the others, and those whose copies are damaged."""
        assert self._stage is not None
        if not all(self._stage.has(each.name, each.unit) for each in wanted):
            self._stage.refresh()
        missing, staged = list[UnitRead](), list[UnitRead]()
        for each in wanted:
            (staged if self._stage.has(each.name, each.unit) else missing).append(each)
        found = self._reader.read([self._stage.chunk(name, unit, raw_bytes(out)) for name, unit, out in staged])
        for each, damage in zip(staged, found.damages, strict=True):
            if damage:
                self._stage.forget(each.name, each.unit)
                missing.append(each)
        with self._lock:
            self.bytes_from_stage += found.num_bytes
        return missing

    def _read_store(self, wanted: Sequence[UnitRead]) -> None:
        chunks = [self._chunk(each) for each in wanted]
        found = self._reader.read(chunks, direct=self.direct)
        with self._lock:
            self.bytes_read += found.num_bytes
        damages = [index for index, damage in enumerate(found.damages) if damage]
        if damages:
            first = min(damages, key=lambda index: (chunks[index].path, chunks[index].start))
            raise self._error(wanted[first], chunks[first], found.damages[first])

    def _unit_bytes(self, name: str) -> int:
        return math.prod(self._specs[name].shape[1:]) * STORAGE[self.parameters[name].dtype].itemsize

    def _chunk(self, wanted: UnitRead) -> Chunk:
        param = self.parameters[wanted.name]
        return self._file(param.file).chunk(Expected(self._specs[wanted.name], param), wanted.unit, wanted.out)

    def _file(self, file_name: str) -> StoreFile:
        with self._lock:
            if file_name not in self._files:
                path, held = self.path / file_name, self._expected(file_name)
                self._files[file_name] = StoreFile(path, find_places(path, held))
            return self._files[file_name]

    def _expected(self, file_name: str) -> list[Expected]:
        return [Expected(self._specs[name], p) for name, p in self.parameters.items() if p.file == file_name]

    def _error(self, wanted: UnitRead, chunk: Chunk, damage: Damage | None) -> StoreError:
        assert damage, f"{wanted = } is whole"
        where = describe(chunk.path, self.parameters[wanted.name].dataset, wanted.unit)
        return StoreError(damage.found, expected=damage.expected, where=where, hint=damage.hint)


def _unit_reads(name: str, units: range, values: np.ndarray) -> list[UnitRead]:
    return [UnitRead(name, unit, values[row]) for row, unit in enumerate(units)]


def _physical_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def is_store(path: Path) -> bool:
    """Whether a folder looks like a store. Not collective."""
    return (path / INDEX_FILE).is_file()
