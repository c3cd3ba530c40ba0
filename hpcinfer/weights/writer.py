"""The files of a store, written by one rank each: layer files with the chunks, and the index. See docs/store.md."""

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcinfer import __version__
from hpcinfer.dtypes import STORAGE, raw_bytes
from hpcinfer.weights.layout import layout, read_units
from hpcinfer.weights.schema import ParamSpec, source_name
from hpcinfer.weights.source import Source
from hpcinfer.weights.store_format import (
    FORMAT,
    FORMAT_VERSION,
    INDEX_FILE,
    OUTER_FILE,
    StoredParam,
    layer_file,
    pack_parameters,
    place,
    store_digest,
)

_HDF5_OPTIONS: dict[str, Any] = {
    "libver": ("v110", "v110"),  # HDF5's own metadata gets checksums; HDF5 1.10 and later read it
    "locking": False,  # parallel file systems are often mounted without locks
    "alignment_threshold": 1 << 16,  # bytes: chunks of at least this size start on a page
    "alignment_interval": 4096,
}


def write_parameters(source: Source, specs: Iterable[ParamSpec], grains: int, path: Path) -> dict[str, StoredParam]:
    """Write one file with some parameters of the source, durable on return.

    Not collective.

    Raises:
        ModelError: a tensor of the wrong shape, or with NaN or infinity.
    """
    with h5py.File(path, "w-", **_HDF5_OPTIONS) as file:
        written = {spec.name: _write_parameter(file, source, spec, grains) for spec in specs}
    sync(path)
    return written


def write_index(
    folder: Path, source: Source, grains: int, parameters: dict[str, StoredParam], source_files: list[dict[str, Any]]
) -> None:
    """Write the index of a store, durable on return. Not collective."""
    path = folder / INDEX_FILE
    digest = store_digest(source.config, grains, parameters, source.tokenizer_files)
    texts = {"format": FORMAT, "hpcinfer_version": __version__, "digest": digest}
    rows, checksums = pack_parameters(parameters)
    with h5py.File(path, "w-", **_HDF5_OPTIONS) as file:
        for name, text in texts.items():
            file.attrs[name] = np.bytes_(text)
        file.attrs["format_version"], file.attrs["grains"] = FORMAT_VERSION, grains
        _write_bytes(file, "config", json.dumps(source.config.to_dict()).encode())
        _write_bytes(file, "sources", json.dumps(source_files).encode())
        tokenizer = file.create_group("tokenizer")
        for name, data in source.tokenizer_files.items():
            _write_bytes(tokenizer, name, data)
        file.create_dataset("parameters", data=rows)
        file.create_dataset("checksums", data=checksums)
        _link_files(file, source.config.num_layers, parameters)
    sync(path)


def sync(path: Path) -> None:
    """Make a file or folder durable. Not collective."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_parameter(file: h5py.File, source: Source, spec: ParamSpec, grains: int) -> StoredParam:
    tensor = source_name(spec.name)
    dtype = source.dtype(tensor)
    file_name, dataset_name = place(spec.name)
    dataset = file.create_dataset(dataset_name, spec.shape, STORAGE[dtype], chunks=(1, *spec.shape[1:]))
    cut = layout(spec, source.config, grains)
    dataset.attrs["dtype"], dataset.attrs["axis"] = np.bytes_(dtype), np.bytes_(spec.axis)
    dataset.attrs["full_shape"] = np.array(cut.full_shape, "<i8")
    if cut.split_dim >= 0:
        dataset.attrs["padded_dim"] = cut.split_dim + 1
        dataset.attrs["true_sizes"] = np.array([len(held) for held in cut.ranges], "<i8")
    checksums = []
    for unit, values in enumerate(read_units(source, spec, grains)):
        dataset.id.write_direct_chunk((unit, *(0,) * values.ndim), values)
        checksums.append(zlib.crc32(raw_bytes(values)))
    return StoredParam(file_name, dataset_name, dtype, tuple(checksums))


def _write_bytes(group: h5py.Group, name: str, data: bytes) -> None:
    group.create_dataset(name, data=np.frombuffer(data, np.uint8))


def _link_files(file: h5py.File, num_layers: int, parameters: dict[str, StoredParam]) -> None:
    for name, param in parameters.items():
        if param.file == OUTER_FILE:
            file[name] = h5py.ExternalLink(OUTER_FILE, param.dataset)
    layers = file.create_group("layers")
    for layer in range(num_layers):
        layers[str(layer)] = h5py.ExternalLink(layer_file(layer), "/")
