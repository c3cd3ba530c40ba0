"""Traces of system calls are counted by place, up to the first token; where strace is, the benchmark runs."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from jobs import mpiexec_command
from sources import CHECKOUT

TRACE = """\
7 execve("/opt/bin/python", [...], 0x7f /* 9 vars */) = 0
7 openat(AT_FDCWD</job>, "/opt/lib/a.py", O_RDONLY|O_CLOEXEC) = 3</opt/lib/a.py>
7 read(3</opt/lib/a.py>, ""..., 4096) = 2048
7 newfstatat(3</opt/lib/a.py>, "", {st_mode=S_IFREG|0644, st_size=2048, ...}, AT_EMPTY_PATH) = 0
7 newfstatat(AT_FDCWD</job>, "out/../in.jsonl", {st_mode=S_IFREG|0644, ...}, 0) = 0
8 openat(AT_FDCWD</job>, "/opt/lib/special/b.py", O_RDONLY <unfinished ...>
7 openat(AT_FDCWD</job>, "/opt/libc.so", O_RDONLY|O_CLOEXEC) = -1 ENOENT (No such file or directory)
8 <... openat resumed>) = 4</opt/lib/special/b.py>
8 read(5<pipe:[77]>, ""..., 100) = 100
7 getdents64(6</opt/lib>, 0x55 /* 3 entries */, 32768) = 72
7 getcwd("/job", 1024) = 5
7 mkdir("/job/out.jsonl.job", 0777) = 0
7 access("the first token is there", F_OK) = -1 ENOENT (No such file or directory)
7 openat(AT_FDCWD</job>, "/opt/lib/late.py", O_RDONLY|O_CLOEXEC) = 3</opt/lib/late.py>
"""


@pytest.fixture
def startup_trace(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("startup_trace")


def test_calls_before_the_first_token_are_counted_by_place(startup_trace: ModuleType, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text(TRACE)
    places = [("library", Path("/opt/lib")), ("special", Path("/opt/lib/special")), ("job", Path("/job"))]
    counts = startup_trace.count(startup_trace.read_calls(trace, "the first token is there"), places)
    assert counts == {
        "library": {"opened": 1, "KiB read": 2, "looked at": 1, "listed": 1},
        "special": {"opened": 1},
        "job": {"looked at": 1, "changed": 1},
        "other": {"opened": 1, "not found": 1},
    }


def test_a_trace_without_the_first_token_is_refused(startup_trace: ModuleType, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text(TRACE)
    with pytest.raises(ValueError, match="first token"):
        list(startup_trace.read_calls(trace, "the second token"))


def test_the_benchmark_finds_less_on_a_rank_that_is_not_the_root(tmp_path: Path) -> None:
    mpiexec_command()  # or skip
    if not shutil.which("strace"):
        pytest.skip("no strace")
    argv = [sys.executable, CHECKOUT / "benchmarks" / "startup.py", "--ranks", "2", "--rounds", "0", "--dir", tmp_path]
    run = subprocess.run([*argv, "--json", tmp_path / "counts.json"], capture_output=True, text=True, timeout=110)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "rank 1" in run.stdout
    (job,) = json.loads((tmp_path / "counts.json").read_text())
    root, other = ({place: counts.get("opened", 0) for place, counts in rank.items()} for rank in job["counts"])
    assert other["hpcinfer"] < root["hpcinfer"] / 3 and other["site-packages"] < root["site-packages"] / 5
    assert 0 < other["Python"] < root["Python"]
