"""Damage to the journal between two starts, as a power loss or a broken disk leaves it."""

import random
import zlib
from pathlib import Path

from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.sidecar import JournalReader

_TORN_BYTES = 200  # at most


def tear_tail(paths: JobPaths, rng: random.Random) -> str:
    """Cut some bytes off a file of the journal, or leave half-written ones behind its end; empty if there is none."""
    file = _choose(paths, rng)
    if file is None:
        return ""
    count = rng.randint(1, _TORN_BYTES)
    if rng.random() < 0.5:
        size = max(0, file.stat().st_size - count)
        with file.open("r+b") as opened:
            opened.truncate(size)
        return f"cut {count} bytes off a {file.suffix}"
    with file.open("ab") as opened:
        opened.write(rng.randbytes(count))
    return f"{count} torn bytes behind a {file.suffix}"


def flip_bit(paths: JobPaths, rng: random.Random) -> str:
    """Flip a bit somewhere in a file of the journal; empty if there is none."""
    file = _choose(paths, rng)
    if file is None:
        return ""
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return f"flipped a bit of a {file.suffix}"


def sound_rows(paths: JobPaths) -> set[int]:
    """Rows whose line is in the journal with every bit."""
    sound = set()
    for part, entries in JournalReader(paths).read():
        data = paths.part_data(part).read_bytes()
        for row, offset, length, crc in entries[["row", "offset", "length", "crc"]].tolist():
            if zlib.crc32(data[offset : offset + length]) == crc:
                sound.add(row)
    return sound


def _choose(paths: JobPaths, rng: random.Random) -> Path | None:
    parts = sorted(path for path in paths.parts.glob("*") if path.suffix != ".void" and path.stat().st_size > 0)
    return rng.choice(parts) if parts else None
