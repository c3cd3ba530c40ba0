"""The index: where each row of the input lies, and the blocks of rows in their order of work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hpcinfer.agree import on_all, on_root
from hpcinfer.errors import ConfigError, JobDirectoryError
from hpcinfer.partition.split import split
from hpcinfer.recovery.durable import publish, remove_abandoned, sync_file, temporary_path
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.order import work_order
from hpcinfer.recovery.patience import AWAY, PatientFile, patiently
from hpcinfer.recovery.scan import COLUMN_TYPES, RowScan, scan

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

FORMAT_VERSION = 1
_TAG = 7001  # of the columns on their way to root
_STORED = ("offsets", "lengths", "hashes")  # columns that the index keeps; the others only order the work
_DATASETS = (*_STORED, "order", "block_starts")


class Span(NamedTuple):
    """Place of a row in the input."""

    offset: int
    length: int  # bytes without the newline


class Index:
    """A read-only view of an index file; only what is asked for is read."""

    def __init__(self, path: Path, plan: dict[str, Any]) -> None:
        """Take another rank's word for what the file holds.

        Args:
            path: of the file.
            plan: of an index that was opened.
        """
        self.path, self.plan, self.input_bytes = path, plan, int(plan["input_bytes"])
        file = PatientFile(path)
        columns = {name: _Column(file, *place) for name, place in plan["columns"].items()}
        self._offsets, self._lengths, self._hashes = (columns[name] for name in _STORED)
        self._order, self._block_starts = columns["order"], columns["block_starts"]

    @staticmethod
    def open(path: Path) -> Index:
        """Open an index. Not collective.

        Raises:
            JobDirectoryError: not there, or damaged.
        """
        return patiently(lambda: Index(path, _read_plan(path)), path)

    @property
    def num_rows(self) -> int:
        """Rows of the input."""
        return self._offsets.size

    @property
    def num_blocks(self) -> int:
        """Blocks of work."""
        return self._block_starts.size - 1

    def block_rows(self, block: int) -> np.ndarray:
        """Rows of a block, in order of work. Not collective."""
        start, stop = self._block_starts.read(block, block + 2).tolist()
        return self._order.read(start, stop).astype(np.int64)

    def block_of_rows(self) -> np.ndarray:
        """Block of each row (uint32, a new array). Not collective."""
        blocks = np.empty(self.num_rows, np.uint32)
        sizes = np.diff(self._block_starts.read(0, self._block_starts.size)).astype(np.int64)
        blocks[self._order.read(0, self.num_rows)] = np.repeat(np.arange(self.num_blocks, dtype=np.uint32), sizes)
        return blocks

    def span(self, row: int) -> Span:
        """Place of a row in the input. Not collective."""
        return Span(self._offsets.item(row), self._lengths.item(row))

    def content_hash(self, row: int) -> int:
        """Hash of the row when the index was built; compare with `scan.content_hash`. Not collective."""
        return self._hashes.item(row)


class _Column:
    """An array of the file, read by position: a mapping would kill the process when the file system is away."""

    def __init__(self, file: PatientFile, start: int, dtype: str, size: int) -> None:
        self._file, self._start, self._dtype, self.size = file, start, np.dtype(dtype), size

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read some consecutive values."""
        item_bytes = self._dtype.itemsize
        return np.frombuffer(self._file.read(self._start + start * item_bytes, (stop - start) * item_bytes),
                             self._dtype)

    def item(self, position: int) -> int:
        """Read one value."""
        return int(self.read(position, position + 1)[0])


def _read_plan(path: Path) -> dict[str, Any]:
    """Ask HDF5 where the columns are, as JSON values."""
    import h5py  # some sixty files: only a rank that asks HDF5 something imports it

    try:
        with h5py.File(path, "r", locking=False) as tree:
            version, input_bytes = int(tree.attrs["format_version"]), int(tree.attrs["input_bytes"])
            columns = {name: [tree[name].id.get_offset(), tree[name].dtype.str, len(tree[name])] for name in _DATASETS}
    except (OSError, KeyError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in AWAY:
            raise
        raise JobDirectoryError(f"the index cannot be read: {error}", where=str(path),
                                hint="delete it: the next start builds it again") from error
    if version != FORMAT_VERSION:
        raise JobDirectoryError(f"index of version {version}", expected=str(FORMAT_VERSION), where=str(path))
    return {"input_bytes": input_bytes, "columns": columns}


def build_index(paths: JobPaths, input_file: Path, kind: str, group: Collectives) -> Index:
    """Open the index of the job; build it first, each rank a byte range of the input, if there is none.

    Collective over the group.

    Args:
        input_file: the plain input.
        kind: "text" or "jsonl".

    Raises:
        ConfigError: an input without rows, or another one than the index was built from.
    """
    input_bytes = int(on_root(group, lambda: str(input_file.stat().st_size).encode()))
    if on_root(group, lambda: b"1" if paths.index.exists() else b"") == b"":
        _build(paths, input_file, kind, input_bytes, group)
    plan = json.loads(on_root(group, lambda: json.dumps(Index.open(paths.index).plan).encode()))
    index = Index(paths.index, plan)
    on_all(group, lambda: _check_input(index, input_bytes, input_file))
    return index


def _check_input(index: Index, input_bytes: int, input_file: Path) -> None:
    if index.input_bytes != input_bytes:
        raise ConfigError(f"the input has {input_bytes} bytes", where=str(input_file),
                          expected=f"{index.input_bytes}, as when the job started",
                          hint="an input must not change while its job is not finished")


def _build(paths: JobPaths, input_file: Path, kind: str, input_bytes: int, group: Collectives) -> None:
    share = split(input_bytes, group.size)[group.rank]
    columns = list(on_all(group, lambda: scan(input_file, share.start, share.stop, kind)))
    counts = [int(count) for count in group.all_gather_bytes(str(len(columns[0])).encode())]
    on_all(group, lambda: _check_rows(sum(counts), input_file))
    whole = on_all(group, lambda: _allocate(sum(counts)) if group.rank == 0 else None)
    if whole is None:
        for column in columns:
            group.send_bytes(column.tobytes(), 0, _TAG).wait()
    else:
        _collect(whole, columns, counts, group)
    on_all(group, lambda: _write(paths, whole, input_bytes) if whole else None)


def _allocate(num_rows: int) -> RowScan:
    return RowScan(**{name: np.empty(num_rows, type_) for name, type_ in COLUMN_TYPES.items()})


def _check_rows(num_rows: int, input_file: Path) -> None:
    if num_rows == 0:
        raise ConfigError("the input has only blank lines", expected="at least one prompt", where=str(input_file))


def _write(paths: JobPaths, columns: RowScan, input_bytes: int) -> None:
    """Write a new index and publish it."""
    import h5py

    remove_abandoned(paths.index)
    temporary = temporary_path(paths.index)
    try:
        with h5py.File(temporary, "w-", locking=False) as file:
            file.attrs.update(format_version=FORMAT_VERSION, input_bytes=input_bytes)
            for name in _STORED:
                file.create_dataset(name, data=getattr(columns, name))
            for name, values in work_order(columns.prefixes, columns.costs)._asdict().items():
                file.create_dataset(name, data=values)
        sync_file(temporary)
        publish(temporary, paths.index)
    finally:
        temporary.unlink(missing_ok=True)


def _collect(targets: RowScan, columns: list[np.ndarray], counts: list[int], group: Collectives) -> None:
    """Put the columns of all ranks one after the other, a rank at a time. `columns` is empty afterwards."""
    for target, column in zip(targets, columns, strict=True):
        target[:counts[0]] = column
    columns.clear()
    start = counts[0]
    for peer, count in enumerate(counts[1:], 1):
        for name, target in targets._asdict().items():
            target[start:start + count] = np.frombuffer(group.receive_bytes(peer, _TAG), COLUMN_TYPES[name])
        start += count
