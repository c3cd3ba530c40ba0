"""System calls of one rank, as strace wrote them down: how often each place was asked for a file."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

CALLS = "%file,fstat,getdents64,read,pread64,preadv,preadv2"  # what strace is asked for
BYTES = "KiB read"
COLUMNS = ("opened", "not found", "looked at", "listed", "changed", BYTES)
OTHER = "other"

_LINE = re.compile(r"(\d+) +(?:\d+\.\d+ )?(\w+)\((.*)\) += (-?\d+|0x\w+)(?:<[^>]*>)?(?: (\w+))?")
_UNFINISHED = re.compile(r"(\d+) +(?:\d+\.\d+ )?(\w+\(.*) <unfinished \.\.\.>$")
_RESUMED = re.compile(r"(\d+) +(?:\d+\.\d+ )?<\.\.\. \w+ resumed>(.*)$")
_NAMED = re.compile(r'(?:\w+<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')  # a path, after the folder that it is relative to
_DESCRIPTOR = re.compile(r"\d+<([^>]*)>")
_OPENING = {"open", "openat", "openat2", "execve"}
_ASIDE = {"getcwd", "chdir", "fchdir"}  # that ask no file system
_READING = {"read", "pread64", "preadv", "preadv2"}
_LOOKING = {"stat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2", "readlink", "readlinkat",
            "statfs", "getxattr", "lgetxattr"}  # fmt: skip


class Call(NamedTuple):
    """One system call."""

    name: str
    path: str  # of the file that it is about
    result: int
    error: str  # as ENOENT; empty if it worked


Counts = Mapping[str, Counter[str]]  # by place, of the columns


def count(calls: Iterable[Call], places: Sequence[tuple[str, Path]]) -> Counts:
    """Count calls by place and column.

    Args:
        calls: of one rank.
        places: name and folder; the longest folder that a path lies in counts.
    """
    by_depth = sorted(places, key=lambda place: -len(str(place[1])))
    counts: dict[str, Counter[str]] = {}
    for call in calls:
        place = next((name for name, folder in by_depth if _is_in(call.path, folder)), OTHER)
        column, amount = _entry(call)
        counts.setdefault(place, Counter())[column] += amount
    return counts


def read_calls(trace: Path, until: str) -> Iterator[Call]:
    """Read the calls on files before the one that names the mark.

    Raises:
        ValueError: the trace has no mark.
    """
    cwd, halves = Path.cwd(), dict[str, str]()
    with trace.open(errors="replace") as file:
        for line in file:
            if half := _UNFINISHED.match(line):
                halves[half[1]] = half[2]
                continue
            if rest := _RESUMED.match(line):
                line = f"{rest[1]} {halves.pop(rest[1], '')}{rest[2]}"
            if until in line:
                return
            found = _LINE.match(line)
            if found and found[2] not in _ASIDE and (path := _path(found[3], cwd)):
                yield Call(found[2], path, int(found[4], 0), (found[5] or "") if found[4] == "-1" else "")
    raise ValueError(f"{trace} does not come to the first token")


def _path(arguments: str, cwd: Path) -> str:
    """The path that a call is about; empty for pipes, sockets and the like."""
    named = _NAMED.match(arguments)
    if named and named[2]:
        return os.path.normpath(os.path.join(named[1] or cwd, named[2]))
    descriptor = _DESCRIPTOR.match(arguments)
    return descriptor[1] if descriptor and descriptor[1].startswith("/") else ""


def _is_in(path: str, folder: Path) -> bool:
    return path == str(folder) or path.startswith(f"{folder}/".replace("//", "/"))


def _entry(call: Call) -> tuple[str, float]:
    """The column that a call counts in, and how much."""
    if call.name in _READING:
        return BYTES, max(0, call.result) / 1024
    if call.error in ("ENOENT", "ENOTDIR"):
        return "not found", 1
    if call.name in _OPENING:
        return "opened", 1
    if call.name == "getdents64":
        return "listed", 1
    return ("looked at" if call.name in _LOOKING or call.name == "fstat" else "changed"), 1
