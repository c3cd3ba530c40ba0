"""The digest of a file that ranks write in parallel: SHA-256 over the SHA-256 of each 16 MiB, taken on the way."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from hpcinfer.agree import on_all

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

BLOCK_BYTES = 16 << 20  # hashed one by one; part of the digest's definition
_ENTRY = struct.Struct("<Q32s")  # block, its SHA-256


class BlockDigests:
    """Hashes of the blocks that lie whole in a run of bytes, which is given from its start to its end."""

    def __init__(self, offset: int) -> None:
        """Begin at this byte of the file."""
        self._position = offset
        self._hash = None if offset % BLOCK_BYTES else hashlib.sha256()
        self.whole: dict[int, bytes] = {}  # by block

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Take in the next bytes. Not collective."""
        view = memoryview(data)
        while view:
            room = BLOCK_BYTES - self._position % BLOCK_BYTES
            part, view = view[:room], view[room:]
            if self._hash is not None:
                self._hash.update(part)
            self._position += len(part)
            if self._position % BLOCK_BYTES == 0:
                self._close()
                self._hash = hashlib.sha256()

    def finish(self, size_bytes: int) -> dict[int, bytes]:
        """Give all hashes; the last block of a file of this size may be short. Not collective."""
        if self._position == size_bytes and size_bytes % BLOCK_BYTES:
            self._close()
        return self.whole

    def _close(self) -> None:
        if self._hash is not None:
            self.whole[(self._position - 1) // BLOCK_BYTES] = self._hash.digest()


def digest_of(path: Path, size_bytes: int, own: dict[int, bytes], group: Collectives) -> str:
    """Put the hashes of all ranks together; blocks that no rank has whole are read, each by one rank.

    Collective over the group.
    """
    known = _exchange(own, group)
    missing = [block for block in range(-(-size_bytes // BLOCK_BYTES)) if block not in known]
    known |= _exchange(on_all(group, lambda: _read(path, missing[group.rank :: group.size])), group)
    return hashlib.sha256(b"".join(known[block] for block in sorted(known))).hexdigest()


def _exchange(own: dict[int, bytes], group: Collectives) -> dict[int, bytes]:
    data = b"".join(_ENTRY.pack(*item) for item in own.items())
    return {block: digest for each in group.all_gather_bytes(data) for block, digest in _ENTRY.iter_unpack(each)}


def _read(path: Path, blocks: list[int]) -> dict[int, bytes]:
    digests = {}
    with path.open("rb") as file:
        for block in blocks:
            file.seek(block * BLOCK_BYTES)
            digests[block] = hashlib.sha256(file.read(BLOCK_BYTES)).digest()
    return digests
