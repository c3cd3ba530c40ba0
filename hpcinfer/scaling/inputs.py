"""Inputs of points: the first rows of the input, in files of the study."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import IO

from hpcinfer.errors import ConfigError
from hpcinfer.recovery.durable import replace_bytes


def count_rows(source: Path) -> int:
    """Count the lines that are not blank.

    Raises:
        ConfigError: there is no such file, or no row in it.
    """
    if not source.is_file():
        raise ConfigError(f"no input at {source}", expected="a file of prompts", hint="--input FILE")
    count = sum(1 for _ in _rows(source))
    if not count:
        raise ConfigError(f"{source} has no rows", expected="a file of prompts")
    return count


def input_file(folder: Path, source: Path, num_rows: int) -> Path:
    """Where the input of so many rows is."""
    suffix = Path(source.name.removesuffix(".gz")).suffix
    return folder / f"rows-{num_rows}{suffix}"


def write_input(folder: Path, source: Path, num_rows: int) -> Path:
    """Write the first rows of the input into a file, beginning again at its end; appears whole."""
    path = input_file(folder, source, num_rows)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        first = list(islice(_rows(source), num_rows))
        replace_bytes(path, b"".join(islice(cycle(first), num_rows)))
    return path


def _rows(source: Path) -> Iterator[bytes]:
    """Lines that are not blank, each with its end."""
    with _open(source) as file:
        yield from (line.rstrip(b"\r\n") + b"\n" for line in file if line.strip())


def _open(source: Path) -> IO[bytes]:
    return gzip.open(source, "rb") if source.suffix == ".gz" else open(source, "rb")  # type: ignore[return-value]
