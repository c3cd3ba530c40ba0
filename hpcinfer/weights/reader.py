"""Reading a store: the index at once, of the other files only the units that are asked for."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import h5py
import numpy as np

from hpcinfer.config import ModelConfig
from hpcinfer.dtypes import SCALES, STORAGE
from hpcinfer.errors import StoreError
from hpcinfer.weights.schema import UNQUANTISED, ParamSpec, scale_name, stored_specs
from hpcinfer.weights.store_file import Expected, StoreFile, describe, open_hdf5
from hpcinfer.weights.store_format import (
    FORMAT,
    FORMAT_VERSION,
    INDEX_FILE,
    StoredParam,
    store_digest,
    unpack_parameters,
)


class StoredArray(NamedTuple):
    """Units of a parameter as stored; bfloat16 is raw uint16."""

    values: np.ndarray  # [units, ...], own memory
    dtype: str  # a key of hpcinfer.dtypes.STORAGE


class StoredWeight(NamedTuple):
    """Units of a weight as stored; see `hpcinfer.dtypes.dequantise`."""

    values: np.ndarray  # [units, O, I], int4 [units, O, padded inputs / 2]
    dtype: str
    scales: np.ndarray | None  # of int8 and int4


class _Index(NamedTuple):
    config: ModelConfig
    grains: int
    quantization: dict[str, Any]  # empty if weights are as in the checkpoint
    digest: str
    parameters: dict[str, StoredParam]
    tokenizer_files: dict[str, bytes]
    attributes: dict[str, str]
    source_files: list[dict[str, Any]]


class Store:
    """An open store. It keeps the last file that was read open: read file by file.

    Where the chunks of a file stand is kept too: a rank that reads again, in a recovery, asks HDF5 no more."""

    def __init__(self, path: Path, index: _Index) -> None:
        self.path = path
        self.config = index.config
        self.grains = index.grains
        self.quantization: str = index.quantization.get("weights", UNQUANTISED)  # none, int8 or int4
        self.calibration: dict[str, Any] | None = index.quantization.get("calibration")
        self.digest = index.digest  # of the whole content: equal for equal models
        self.tokenizer_files = index.tokenizer_files  # by name: tokenizer.json, tokenizer_config.json, ...
        self.parameters = index.parameters  # by name, in the order of `stored_specs`
        self.source_files = index.source_files  # name, size and sha256 of what was converted
        self.hpcinfer_version = index.attributes["hpcinfer_version"]
        self.bytes_read = 0  # of chunks, so far
        self._specs = {spec.name: spec for spec in stored_specs(index.config, index.grains, self.quantization)}
        self._files: dict[str, StoreFile] = {}  # that have been read, by name
        self._current: StoreFile | None = None

    @staticmethod
    def open(path: Path) -> "Store":
        """Open a store; reads the index only.

        Not collective.

        Raises:
            StoreError: no store, another format version, or a damaged index.
        """
        file = Path(path) / INDEX_FILE
        store = Store(Path(path), _read_index(file))
        for name in store._specs:
            if name not in store.parameters or len(store.parameters[name].checksums) != store._specs[name].shape[0]:
                raise StoreError(
                    f"the index does not list {name} with its units",
                    expected="all parameters of the model",
                    where=str(file),
                    hint="convert the model again",
                )
        return store

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file that was read last. Not collective."""
        if self._current is not None:
            self._current.close()
        self._current = None

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
        spec, param = self._specs[name], self.parameters[name]
        units = range(spec.shape[0]) if units is None else units
        values = np.empty((len(units), *spec.shape[1:]), STORAGE[param.dtype])
        file = self._open(param.file)
        for row, unit in enumerate(units):
            file.read_unit(Expected(spec, param), unit, values[row])
        self.bytes_read += values.nbytes
        return StoredArray(values, param.dtype)

    def read_weight(self, name: str, units: range | None = None) -> StoredWeight:
        """Read some units of a weight with their scales, if it has any. See `read`.

        Not collective.
        """
        values, dtype = self.read(name, units)
        scales = self.read(scale_name(name), units).values if dtype in SCALES else None
        return StoredWeight(values, dtype, scales)

    def verify(self) -> None:
        """Read everything once and compare all checksums.

        Not collective.

        Raises:
            StoreError: the first damage found.
        """
        for name, spec in self._specs.items():
            for unit in range(spec.shape[0]):
                self.read(name, range(unit, unit + 1))

    def _open(self, file_name: str) -> StoreFile:
        if file_name not in self._files:
            held = [
                Expected(self._specs[name], param) for name, param in self.parameters.items() if param.file == file_name
            ]
            self._files[file_name] = StoreFile(self.path / file_name, held)
        if self._current is not self._files[file_name]:
            self.close()
            self._current = self._files[file_name]
        return self._current


def is_store(path: Path) -> bool:
    """Whether a folder looks like a store. Not collective."""
    return (path / INDEX_FILE).is_file()


def _read_index(path: Path) -> _Index:
    with open_hdf5(path) as file:
        _check_format(file, path)
        attributes = {name: file.attrs[name].decode() for name in ("digest", "hpcinfer_version")}
        index = _Index(
            config=ModelConfig.from_dict(json.loads(_read_bytes(file, "config"))),
            grains=int(file.attrs["grains"]),
            quantization=json.loads(_read_bytes(file, "quantization")) if "quantization" in file else {},
            digest=attributes["digest"],
            parameters=unpack_parameters(file["parameters"][()], file["checksums"][()]),
            tokenizer_files={name: _read_bytes(file, f"tokenizer/{name}") for name in file["tokenizer"]},
            attributes=attributes,
            source_files=json.loads(_read_bytes(file, "sources")),
        )
    found = store_digest(
        index.config, index.grains, index.quantization, index.parameters, index.tokenizer_files
    )
    if found != index.digest:
        raise StoreError(
            f"the index has the digest {found[:16]}",
            expected=f"{index.digest[:16]}, as when written",
            where=describe(path, "digest"),
            hint="convert the model again",
        )
    return index


def _check_format(file: h5py.File, path: Path) -> None:
    if file.attrs.get("format") != FORMAT.encode():
        raise StoreError("an HDF5 file of another kind", expected=f"the attribute format = {FORMAT}", where=str(path))
    version = int(file.attrs["format_version"])
    if version != FORMAT_VERSION:
        raise StoreError(
            f"a store of format version {version}",
            expected=f"version {FORMAT_VERSION}",
            where=str(path),
            hint="convert the model again with this hpcinfer",
        )


def _read_bytes(file: h5py.File, name: str) -> bytes:
    data = file[name][()]
    return bytes(np.asarray(data, np.uint8).tobytes())
