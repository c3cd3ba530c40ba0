"""Snapshots: output tokens of sequences that were stopped in the middle; whoever opens their rows goes on there.

    snapshots/<shard>/<block>.<incarnation>.json     a line of JSON, and a line with its CRC-32

Only a help: a file that is torn, gone, or of other rows than it says counts as none, and the rows begin anew. Nobody
changes a file or deletes a single one, so readers need not know of each other; all go when the job is complete.
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from hpcinfer.errors import JobDirectoryError
from hpcinfer.recovery.claims import SHARD_BLOCKS
from hpcinfer.recovery.durable import publish_bytes
from hpcinfer.recovery.index import Index
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.leases import incarnation_name

log = logging.getLogger(__name__)

_VERSION = 1
Outputs = tuple[tuple[int, ...], ...]  # output tokens so far, by choice


class Unfinished(NamedTuple):
    """A row that was stopped in the middle."""

    row: int
    block: int
    outputs: Outputs


class Saved(NamedTuple):
    """What a snapshot holds."""

    num_sequences: int  # that have tokens
    num_tokens: int


class Snapshots:
    """Snapshots of a job, written and read. Not thread safe: use it from one thread at a time."""

    def __init__(self, paths: JobPaths, index: Index, attempt: int) -> None:
        self._directory, self._index, self._attempt = paths.snapshots, index, attempt
        self._block, self._outputs = -1, dict[int, Outputs]()  # the block that was read last, its outputs by row

    def save(self, rows: Iterable[Unfinished]) -> Saved:
        """Keep what these rows have so far, a file for each block; durable on return. Not collective.

        Where the file system refuses, nothing is kept: the rows begin anew.
        """
        blocks: dict[int, list[Unfinished]] = {}
        for each in rows:
            if any(each.outputs):
                blocks.setdefault(each.block, []).append(each)
        try:
            self._write(blocks)
        except (OSError, JobDirectoryError) as error:
            log.warning("what was stopped in the middle cannot be kept, and will begin anew: %s", error)
            return Saved(0, 0)
        outputs = [ids for held in blocks.values() for each in held for ids in each.outputs if ids]
        return Saved(len(outputs), sum(map(len, outputs)))

    def resumed(self, row: int, block: int) -> Outputs:
        """Output tokens that a row of this block has already, by choice; () if it begins anew. Not collective."""
        if block != self._block:
            self._block, self._outputs = block, self._read(block)
        return self._outputs.get(row, ())

    def _write(self, blocks: dict[int, list[Unfinished]]) -> None:
        incarnation = incarnation_name()
        for block, held in blocks.items():
            shard = self._shard(block)
            shard.mkdir(parents=True, exist_ok=True)
            publish_bytes(shard / f"{block}.{incarnation}.json", self._encode(held))

    def _shard(self, block: int) -> Path:
        return self._directory / f"{block // SHARD_BLOCKS:06d}"

    def _encode(self, held: list[Unfinished]) -> bytes:
        rows = [{"row": each.row, "hash": self._index.content_hash(each.row), "outputs": each.outputs} for each in held]
        record = {"version": _VERSION, "attempt": self._attempt, "rows": rows}
        data = json.dumps(record, separators=(",", ":")).encode()
        return data + b"\n%08x\n" % zlib.crc32(data)

    def _read(self, block: int) -> dict[int, Outputs]:
        found: dict[int, Outputs] = {}
        doubtful = set[int]()
        for path in sorted(self._shard(block).glob(f"{block}.*.json")):
            for row, outputs in self._decode(path):
                joined = _join(found[row], outputs) if row in found else outputs
                found[row] = joined
                doubtful |= set() if joined else {row}
        if doubtful:
            log.warning("snapshots of rows %s differ: these rows begin anew", sorted(doubtful))
        return {row: outputs for row, outputs in found.items() if row not in doubtful}

    def _decode(self, path: Path) -> list[tuple[int, Outputs]]:
        """Read the rows of a file that are still what they were; none if it is not whole."""
        try:
            data, _, check = path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return []  # the job is complete
        except OSError as error:
            log.warning("a snapshot cannot be read, its rows begin anew: %s: %s", path, error)
            return []
        if check != b"%08x\n" % zlib.crc32(data):
            log.warning("a snapshot is damaged, its rows begin anew: %s", path)
            return []
        record = json.loads(data)
        if (record["version"], record["attempt"]) != (_VERSION, self._attempt):
            return []
        return [(each["row"], tuple(map(tuple, each["outputs"]))) for each in record["rows"] if self._is_same(each)]

    def _is_same(self, each: dict[str, Any]) -> bool:
        row = each["row"]
        return row < self._index.num_rows and self._index.content_hash(row) == each["hash"]


def remove_snapshots(paths: JobPaths) -> None:
    """Delete all snapshots of a job that is complete. Not collective."""
    shutil.rmtree(paths.snapshots, ignore_errors=True)


def _join(one: Outputs, other: Outputs) -> Outputs:
    """Take the longer one for each choice; () if one is not the beginning of the other."""
    pairs = [sorted(pair, key=len) for pair in zip(one, other, strict=False)]
    is_one_story = len(one) == len(other) and all(long[: len(short)] == short for short, long in pairs)
    return tuple(long for _, long in pairs) if is_one_story else ()
