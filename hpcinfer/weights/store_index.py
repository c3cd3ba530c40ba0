"""The index of a store: read from its file by one rank, and packed for the others, who then need no HDF5 for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hpcinfer.config import ModelConfig
from hpcinfer.errors import StoreError
from hpcinfer.weights.schema import UNQUANTISED, stored_specs
from hpcinfer.weights.store_file import describe, open_hdf5
from hpcinfer.weights.store_format import (
    FORMAT,
    FORMAT_VERSION,
    INDEX_FILE,
    StoredParam,
    place,
    store_digest,
    unpack_parameters,
)

if TYPE_CHECKING:
    import h5py

_LENGTH_BYTES = 8  # of the packed text, before it


class StoreIndex(NamedTuple):
    """What a store holds besides weights."""

    config: ModelConfig
    grains: int
    quantization: dict[str, Any]  # empty if weights are as in the checkpoint
    digest: str
    parameters: dict[str, StoredParam]
    tokenizer_files: dict[str, bytes]
    attributes: dict[str, str]
    source_files: list[dict[str, Any]]


def read_index(folder: Path) -> StoreIndex:
    """Read and check the index of a store.

    Not collective.

    Raises:
        StoreError: no store, another format version, or a damaged index.
    """
    path = folder / INDEX_FILE
    with open_hdf5(path) as file:
        _check_format(file, path)
        attributes = {name: file.attrs[name].decode() for name in ("digest", "hpcinfer_version")}
        index = StoreIndex(
            config=ModelConfig.from_dict(json.loads(_read_bytes(file, "config"))),
            grains=int(file.attrs["grains"]),
            quantization=json.loads(_read_bytes(file, "quantization")) if "quantization" in file else {},
            digest=attributes["digest"],
            parameters=unpack_parameters(file["parameters"][()], file["checksums"][()]),
            tokenizer_files={name: _read_bytes(file, f"tokenizer/{name}") for name in file["tokenizer"]},
            attributes=attributes,
            source_files=json.loads(_read_bytes(file, "sources")),
        )
    _check_digest(index, path)
    _check_parameters(index, path)
    return index


def pack_index(index: StoreIndex) -> bytes:
    """Make bytes of an index. Not collective."""
    text = json.dumps({
        "config": index.config.to_dict(),
        "grains": index.grains,
        "quantization": index.quantization,
        "digest": index.digest,
        "parameters": {name: [param.dtype, *param.checksums] for name, param in index.parameters.items()},
        "tokenizer_sizes": {name: len(data) for name, data in index.tokenizer_files.items()},
        "attributes": index.attributes,
        "source_files": index.source_files,
    }).encode()  # fmt: skip
    return b"".join([len(text).to_bytes(_LENGTH_BYTES, "little"), text, *index.tokenizer_files.values()])


def unpack_index(data: bytes) -> StoreIndex:
    """Inverse of `pack_index`. Not collective."""
    start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    values = json.loads(data[_LENGTH_BYTES:start])
    files = {}
    for name, size_bytes in values.pop("tokenizer_sizes").items():
        files[name] = data[start : start + size_bytes]
        start += size_bytes
    parameters = {
        name: StoredParam(*place(name), dtype, tuple(checksums))
        for name, (dtype, *checksums) in values.pop("parameters").items()
    }
    config = ModelConfig.from_dict(values.pop("config"))
    return StoreIndex(config=config, parameters=parameters, tokenizer_files=files, **values)


def _check_digest(index: StoreIndex, path: Path) -> None:
    found = store_digest(index.config, index.grains, index.quantization, index.parameters, index.tokenizer_files)
    if found != index.digest:
        raise StoreError(
            f"the index has the digest {found[:16]}",
            expected=f"{index.digest[:16]}, as when written",
            where=describe(path, "digest"),
            hint="convert the model again",
        )


def _check_parameters(index: StoreIndex, path: Path) -> None:
    for spec in stored_specs(index.config, index.grains, index.quantization.get("weights", UNQUANTISED)):
        if spec.name not in index.parameters or len(index.parameters[spec.name].checksums) != spec.shape[0]:
            raise StoreError(
                f"the index does not list {spec.name} with its units",
                expected="all parameters of the model",
                where=str(path),
                hint="convert the model again",
            )


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
