"""The files of a store, written by one rank each: layer files with the chunks, and the index. See docs/store.md."""

import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from hpcinfer import __version__
from hpcinfer.dtypes import SCALES, STORAGE, raw_bytes, to_float32
from hpcinfer.weights.layout import Layout, layout, read_units
from hpcinfer.weights.quantise import error_factor, quantise
from hpcinfer.weights.schema import ParamSpec, quantised_specs, quantised_type, source_name
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


class Shape(NamedTuple):
    """What a conversion makes of every model."""

    grains: int
    quantization: str  # none, int8, fp8 or int4


Moments = dict[str, np.ndarray]  # by dataset: second moments of a weight's inputs, float64 [1 or units, I, I]


class Part(NamedTuple):
    """One dataset that a parameter becomes."""

    spec: ParamSpec
    dtype: str

    @property
    def unit_bytes(self) -> int:
        """Bytes of one unit."""
        return math.prod(self.spec.shape[1:]) * STORAGE[self.dtype].itemsize


def parts_of(source: Source, spec: ParamSpec, quantization: str) -> list[Part]:
    """Say which datasets a parameter becomes: itself, or codes and scales. Not collective."""
    kind = quantised_type(spec.name, quantization)
    dtypes = (kind, SCALES[kind]) if kind else (source.dtype(source_name(spec.name)),)
    return [Part(*pair) for pair in zip(quantised_specs(spec, quantization), dtypes, strict=True)]


def write_parameters(
    source: Source, specs: Iterable[ParamSpec], shape: Shape, path: Path, moments: Moments
) -> dict[str, StoredParam]:
    """Write one file with some parameters of the source, durable on return.

    Not collective.

    Args:
        source: gives the tensors.
        specs: what is written, as `param_specs` lists it.
        shape: grains, and how weights are quantised.
        path: of the file to make.
        moments: of the inputs of weights, as far as they are known; the others are rounded to nearest.

    Raises:
        ModelError: a tensor of the wrong shape, or with NaN or infinity.
    """
    written: dict[str, StoredParam] = {}
    with h5py.File(path, "w-", **_HDF5_OPTIONS) as file:
        for spec in specs:
            written |= _write_parameter(file, source, spec, shape, moments.get(place(spec.name)[1]))
    sync(path)
    return written


class Contents(NamedTuple):
    """What the index says of the files."""

    grains: int
    quantization: dict[str, Any]  # "weights": int8, fp8 or int4, "calibration": its facts; empty if not quantised
    parameters: dict[str, StoredParam]
    source_files: list[dict[str, Any]]


def write_index(folder: Path, source: Source, contents: Contents) -> None:
    """Write the index of a store, durable on return. Not collective."""
    path, grains, quantization, parameters = folder / INDEX_FILE, *contents[:3]
    digest = store_digest(source.config, grains, quantization, parameters, source.tokenizer_files)
    texts = {"format": FORMAT, "hpcinfer_version": __version__, "digest": digest}
    rows, checksums = pack_parameters(parameters)
    with h5py.File(path, "w-", **_HDF5_OPTIONS) as file:
        for name, text in texts.items():
            file.attrs[name] = np.bytes_(text)
        file.attrs["format_version"], file.attrs["grains"] = FORMAT_VERSION, grains
        _write_bytes(file, "config", json.dumps(source.config.to_dict()).encode())
        _write_bytes(file, "sources", json.dumps(contents.source_files).encode())
        if quantization:
            _write_bytes(file, "quantization", json.dumps(quantization).encode())
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


class _Dataset:
    """One dataset of an open file, written unit by unit."""

    def __init__(self, file: h5py.File, part: Part) -> None:
        self.name, self._dtype = part.spec.name, part.dtype
        shape = part.spec.shape
        self._file_name, self._dataset_name = place(self.name)
        self._dataset = file.create_dataset(self._dataset_name, shape, STORAGE[part.dtype], chunks=(1, *shape[1:]))
        self._checksums: list[int] = []
        self._dataset.attrs["dtype"] = np.bytes_(part.dtype)
        self._dataset.attrs["axis"] = np.bytes_(part.spec.axis)

    def describe_cut(self, cut: Layout) -> None:
        """Say which tensor of the checkpoint this is, and how it was cut."""
        self._dataset.attrs["full_shape"] = np.array(cut.full_shape, "<i8")
        if cut.split_dim >= 0:
            self._dataset.attrs["padded_dim"] = cut.split_dim + 1
            self._dataset.attrs["true_sizes"] = np.array([len(held) for held in cut.ranges], "<i8")

    def append(self, values: np.ndarray) -> None:
        """Write the next unit."""
        values = np.ascontiguousarray(values)
        self._dataset.id.write_direct_chunk((len(self._checksums), *(0,) * values.ndim), values)
        self._checksums.append(zlib.crc32(raw_bytes(values)))

    def stored(self) -> StoredParam:
        """What the index is to know."""
        return StoredParam(self._file_name, self._dataset_name, self._dtype, tuple(self._checksums))


def _write_parameter(
    file: h5py.File, source: Source, spec: ParamSpec, shape: Shape, moments: np.ndarray | None
) -> dict[str, StoredParam]:
    datasets = [_Dataset(file, part) for part in parts_of(source, spec, shape.quantization)]
    datasets[0].describe_cut(layout(spec, source.config, shape.grains))
    kind, stored = quantised_type(spec.name, shape.quantization), source.dtype(source_name(spec.name))
    for values, factor in zip(read_units(source, spec, shape.grains), _factors(moments), strict=False):
        arrays = quantise(to_float32(values, stored), kind, factor) if kind else (values,)
        for dataset, array in zip(datasets, arrays, strict=True):
            dataset.append(array)
    return {dataset.name: dataset.stored() for dataset in datasets}


def _factors(moments: np.ndarray | None) -> Iterator[np.ndarray | None]:
    """What `quantise` needs for each unit: one for all that share their inputs, or one for each."""
    if moments is None:
        return repeat(None)
    return repeat(error_factor(moments[0])) if len(moments) == 1 else map(error_factor, moments)


def _write_bytes(group: h5py.Group, name: str, data: bytes) -> None:
    group.create_dataset(name, data=np.frombuffer(data, np.uint8))


def _link_files(file: h5py.File, num_layers: int, parameters: dict[str, StoredParam]) -> None:
    for name, param in parameters.items():
        if param.file == OUTER_FILE:
            file[name] = h5py.ExternalLink(OUTER_FILE, param.dataset)
    layers = file.create_group("layers")
    for layer in range(num_layers):
        layers[str(layer)] = h5py.ExternalLink(layer_file(layer), "/")
