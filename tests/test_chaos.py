"""The chaos benchmark in short, what it counts, and the virtual hosts that it can cut off and kill."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from jobs import mpi_environment, mpiexec_command, wait_until
from made_up_hosts import CLUSTER, Hosts, virtual_hosts
from sources import CHECKOUT

from hpcinfer.recovery.journal import PartWriter
from hpcinfer.recovery.layout import JobPaths

SHORT = ("rank", "plain-rank", "launcher", "torn", "flipped")
ECHO = """
import socket, sys
server = socket.create_server(("", 5000))
print("ready", flush=True)
connection, _ = server.accept()
while data := connection.recv(1):
    connection.sendall(data)
"""
PING = """
import socket, sys, time
connection = socket.create_connection(("vh1", 5000), 5)
connection.settimeout(5)
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
times = []
for _ in range(int(sys.argv[1])):
    start = time.perf_counter()
    connection.sendall(b"x")
    connection.recv(1)
    times.append(time.perf_counter() - start)
print(min(times))
"""


def chaos(*arguments: "str | Path") -> subprocess.CompletedProcess[str]:
    """Run the benchmark."""
    argv = [sys.executable, CHECKOUT / "benchmarks" / "chaos.py", *arguments]
    environment = {**os.environ, **mpi_environment()}
    return subprocess.run(argv, capture_output=True, text=True, timeout=200, env=environment)


def played(**changes: Any) -> dict[str, Any]:
    """A round in which all went well."""
    counts = dict.fromkeys(("rows_lost", "rows_twice", "rows_again", "rows_overlapping", "rows_damaged"), 0)
    fault = {"time": 5.0, "what": "kill", "moment": "decode"}
    start = {"mesh": "1x1x2", "exit_code": 0, "seconds": 9.0}
    return {"kind": "rank", "seed": 7, "mesh": "1x1x2", "begin": 0.0, "faults": [fault], "starts": [start], **counts,
            "recoveries": [], "next_row_s": [1.0], "growth": [], "problems": [], "is_equal": True, "is_right": True,
            **changes}  # fmt: skip


@pytest.mark.time_limit(220)
def test_hurt_jobs_give_the_same_bytes(tmp_path: Path) -> None:
    mpiexec_command()  # or skip
    size = ["--rounds", str(len(SHORT)), "--rows", "100", "--seed", "3"]
    run = chaos(*size, "--kinds", ",".join(SHORT), "--output", tmp_path / "results", "--dir", tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "results" / "report.json").read_text())
    rounds = [json.loads(line) for line in (tmp_path / "results" / "rounds.jsonl").read_text().splitlines()]
    assert {each["kind"] for each in rounds} | set(report["skipped"]) == set(SHORT)
    assert report["all"]["rounds"] == report["all"]["is_equal"] == len(SHORT)
    assert report["all"]["faults"] > 0, "all faults came too late"
    assert (tmp_path / "results" / "report.md").read_text() == run.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


@pytest.mark.time_limit(220)
def test_interrupted_benchmark_reports_what_it_has(tmp_path: Path) -> None:
    mpiexec_command()  # or skip
    results = tmp_path / "results"
    argv = [sys.executable, CHECKOUT / "benchmarks" / "chaos.py", "--rounds", "1000", "--rows", "20", "--kinds", "torn"]
    environment = {**os.environ, **mpi_environment()}
    with subprocess.Popen([*argv, "--output", results, "--dir", tmp_path], env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:  # fmt: skip
        wait_until(lambda: (results / "rounds.jsonl").exists() and (results / "rounds.jsonl").read_text(), timeout=150)
        process.terminate()
        said, _ = process.communicate(timeout=30)
    num_rounds = (results / "rounds.jsonl").read_text().count("\n")
    assert f"| torn | {num_rounds} |" in said
    assert process.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_wrong_rounds_are_named_and_fail(tmp_path: Path) -> None:
    rounds = [played(), played(seed=8, is_equal=False, rows_lost=2, is_right=False, problems=["no output"])]
    (tmp_path / "rounds.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rounds))
    run = chaos("--from", tmp_path / "rounds.jsonl", "--output", tmp_path)
    assert run.returncode == 1
    assert "--kinds rank --seed 8: equal False, rows_lost 2" in run.stdout and "no output" in run.stdout


def test_report_gives_percentiles_of_what_was_measured(benchmark_module: Callable[[str], ModuleType]) -> None:
    chaos_report = benchmark_module("chaos_report")
    times = [dict.fromkeys(chaos_report._PHASES, None) | {"fault_to_token_s": seconds} for seconds in (1.0, 2.0, 3.0)]
    report = chaos_report.summary([played(recoveries=[each]) for each in times], {"host": "no namespaces"})
    assert report["phases"] == {"fault_to_token_s": {"measured": 3, "p50": 2.0, "p95": 2.9, "max": 3.0}}
    assert report["kinds"]["rank"]["fault_to_token_s"]["p50"] == 2.0
    page = chaos_report.markdown(report)
    assert "| rank | 3 | 3 | 3 | 3 | 3 | 0 |" in page and "Left out: host: no namespaces." in page


def rank_report(replica: int, tokens: list[int], longest_s: float, **recovery: Any) -> dict[str, Any]:
    """What a leader reports; its run began at 90 s."""
    line = {"start_time": 90.0, "interval_s": 0.5, "tokens": tokens, "steps": tokens,
            "longest_s": [longest_s] * len(tokens)}  # fmt: skip
    known = {"replica": replica, "cause": "rank died", "mesh": "dp=1", "agree_s": 0.1, "refill_s": 0.2}
    return {"place": {"replica": replica}, "timeline": line, "recoveries": [{**known, **recovery}] if recovery else []}


def test_recoveries_are_timed_from_the_first_fault_that_they_heal(
    benchmark_module: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    hit = rank_report(0, [50] * 20 + [0] * 2 + [50] * 8, 0.1, found_time=100.5, first_token_time=101.0)
    (tmp_path / "a.json").write_text(json.dumps({"ranks": [hit, rank_report(1, [9] * 30, 0.3)]}))
    (tmp_path / "torn.json").write_text("")
    (found,) = benchmark_module("chaos_recoveries").recoveries([100.0, 100.4, 120.0], sorted(tmp_path.iterdir()))
    assert found["detect_s"] == pytest.approx(0.1)
    assert found["first_token_s"] == pytest.approx(0.2)
    assert found["fault_to_token_s"] == pytest.approx(1.0)
    assert found["fault_to_90_percent_s"] == pytest.approx(2.0)  # a whole window behind the pause
    assert found["others_before_s"] == found["others_meanwhile_s"] == 0.3


def test_rows_are_counted_once(benchmark_module: Callable[[str], ModuleType]) -> None:
    lines = "".join(json.dumps({"row": row}) + "\n" for row in (0, 1, 1, 3, 3, 3))
    assert benchmark_module("chaos_round").count_rows(lines.encode() + b'{"row": 2, "te\n', 5) == (2, 3)


def write_part(paths: JobPaths, name: str, rows: range) -> None:
    """Write a finished line for each row."""
    with PartWriter(paths, name) as part:
        for row in rows:
            part.append(row, 1, b'{"row": %d, "text": "some words"}' % row)


@pytest.fixture
def paths(tmp_path: Path) -> JobPaths:
    """A job directory with ten finished rows."""
    paths = JobPaths(tmp_path / "out.jsonl")
    paths.create()
    write_part(paths, "first", range(10))
    return paths


def test_watch_tells_rows_computed_again_from_overlaps(
    benchmark_module: Callable[[str], ModuleType], paths: JobPaths
) -> None:
    watch = benchmark_module("chaos_journal").JournalWatch(paths, [3] * 12)
    assert watch.num_finished == 10
    fault = time.time()
    write_part(paths, "second", range(8, 12))
    assert watch.num_finished == 12
    write_part(paths, "third", range(11, 12))
    watch.close()
    assert watch.again([fault], set()) == (2, 1)  # 8 and 9 were finished before, 11 has two owners
    assert watch.again([fault], {8, 11}) == (1, 0)
    assert [tokens for _, tokens in watch.growth] == [30, 6]
    assert watch.first_after(fault) == watch.growth[1][0]


@pytest.mark.parametrize("seed", range(8))
def test_flipped_bit_costs_rows(benchmark_module: Callable[[str], ModuleType], paths: JobPaths, seed: int) -> None:
    damage = benchmark_module("chaos_damage")
    assert damage.sound_rows(paths) == set(range(10))
    what = damage.flip_bit(paths, random.Random(seed))
    assert len(damage.sound_rows(paths)) == 9 if ".jsonl" in what else len(damage.sound_rows(paths)) < 10


@pytest.mark.parametrize("seed", range(8))
def test_torn_end_costs_rows_only_where_it_was_cut(
    benchmark_module: Callable[[str], ModuleType], paths: JobPaths, seed: int
) -> None:
    damage = benchmark_module("chaos_damage")
    what = damage.tear_tail(paths, random.Random(seed))
    assert (len(damage.sound_rows(paths)) < 10) == what.startswith("cut")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Hosts]:
    """Two virtual hosts; skips where they cannot be."""
    with virtual_hosts(tmp_path, 2, delay_us=2000, mbit_per_s=0) as hosts:
        yield hosts
    assert not (tmp_path / "cluster").exists()


def start_on(cluster: Hosts, host: str, *command: str) -> subprocess.Popen[str]:
    """Start a command on a virtual host."""
    return subprocess.Popen([CLUSTER, "exec", host, *command], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL, env=cluster.environment)


def is_reached(cluster: Hosts) -> float | None:
    """Seconds from vh0 to vh1 and back; None if vh1 does not answer."""
    echo = start_on(cluster, "vh1", sys.executable, "-c", ECHO)
    assert echo.stdout is not None and echo.stdout.readline() == "ready\n"
    ping = start_on(cluster, "vh0", sys.executable, "-c", PING, "5")
    said, _ = ping.communicate(timeout=20)
    echo.kill()
    echo.communicate()
    return float(said) if ping.returncode == 0 else None


def test_virtual_hosts_have_names_and_slow_links(cluster: Hosts) -> None:
    assert [cluster("exec", host, "hostname") for host in ("vh0", "vh1")] == ["vh0", "vh1"]
    assert cluster("hostfile", "3").split("\n") == ["vh0 slots=3", "vh1 slots=3"]
    assert 0.004 <= (is_reached(cluster) or 0) < 0.1
    cluster("link", "0", "0")
    assert 0 < (is_reached(cluster) or 0) < 0.004


def test_host_that_is_cut_off_answers_once_it_is_healed(cluster: Hosts) -> None:
    cluster("cut", "vh1")
    assert is_reached(cluster) is None
    cluster("heal", "vh1")
    assert is_reached(cluster) is not None


def test_killed_host_has_no_process_left(cluster: Hosts) -> None:
    there, other = (start_on(cluster, host, "sleep", "60") for host in ("vh1", "vh0"))
    wait_until(lambda: all("sleep" in psutil.Process(process.pid).name() for process in (there, other)), timeout=10)
    cluster("kill", "vh1")
    assert there.wait(5) == -9
    assert other.poll() is None
    other.kill()
    other.wait()
    assert cluster("exec", "vh1", "hostname") == "vh1"  # the host itself goes on, as after a reboot
