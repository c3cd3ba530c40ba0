"""What writer and reader of a store agree on: file names, the index's tables, and the digest. See docs/store.md."""

import hashlib
import json
from typing import Any, NamedTuple

import numpy as np

from hpcinfer.config import ModelConfig

FORMAT, FORMAT_VERSION = "hpcinfer-store", 1
INDEX_FILE, OUTER_FILE = "index.h5", "outer.h5"
MAX_CHUNK = (1 << 32) - 1  # bytes; HDF5's limit


class StoredParam(NamedTuple):
    """What the index knows of one parameter."""

    file: str  # name of the HDF5 file in the store's folder
    dataset: str  # name inside that file
    dtype: str  # a key of hpcinfer.dtypes.STORAGE
    checksums: tuple[int, ...]  # crc32 of each unit's bytes


def place(name: str) -> tuple[str, str]:
    """File and dataset of a parameter: layers.3.q_proj.weight is q_proj.weight in layer-0003.h5. Not collective."""
    if not name.startswith("layers."):
        return OUTER_FILE, name
    _, layer, dataset = name.split(".", 2)
    return layer_file(int(layer)), dataset


def layer_file(layer: int) -> str:
    """Name of a layer's file. Not collective."""
    return f"layer-{layer:04d}.h5"


def store_digest(
    config: ModelConfig, grains: int, quantization: dict[str, Any], parameters: dict[str, StoredParam],
    tokenizer_files: dict[str, bytes],
) -> str:  # fmt: skip
    """Identify the content of a store, whatever its path and however many ranks wrote it.

    Not collective.

    Args:
        config: of the model.
        grains: of the store.
        quantization: what the index says of it; empty if weights are as in the checkpoint.
        parameters: by name, in order.
        tokenizer_files: by name.
    """
    content: dict[str, Any] = {
        "format": [FORMAT, FORMAT_VERSION],
        "config": config.to_dict(),
        "grains": grains,
        "parameters": {name: [param.dtype, list(param.checksums)] for name, param in parameters.items()},
        "tokenizer": {name: hashlib.sha256(data).hexdigest() for name, data in tokenizer_files.items()},
    }
    if quantization:
        content["quantization"] = quantization
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def pack_parameters(parameters: dict[str, StoredParam]) -> tuple[np.ndarray, np.ndarray]:
    """Make the index's two tables: a row per parameter, and the checksums of all units. Not collective."""
    columns = [("name", "S64"), ("dtype", "S16"), ("num_units", "<u4"), ("first_checksum", "<u8")]
    rows, checksums = np.zeros(len(parameters), np.dtype(columns)), list[int]()
    for row, (name, param) in enumerate(parameters.items()):
        rows[row] = (name.encode(), param.dtype.encode(), len(param.checksums), len(checksums))
        checksums += param.checksums
    return rows, np.array(checksums, "<u4")


def unpack_parameters(rows: np.ndarray, checksums: np.ndarray) -> dict[str, StoredParam]:
    """Inverse of `pack_parameters`. Not collective."""
    parameters = {}
    for row in rows:
        name, first = row["name"].decode(), int(row["first_checksum"])
        of_units = tuple(int(crc) for crc in checksums[first : first + int(row["num_units"])])
        parameters[name] = StoredParam(*place(name), row["dtype"].decode(), of_units)
    return parameters
