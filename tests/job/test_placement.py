"""Jobs on virtual hosts: ranks take places by where they run, and the output is that of one rank."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from golden import DEMO_MODEL, demo_prompts, varied_rows, write_rows
from jobs import fault_tolerance, run_job
from made_up_hosts import Hosts, virtual_hosts

FLAGS = ("--seed", "3", "--max-tokens", "12")


@pytest.fixture(scope="module")
def hosts(folder: Path) -> Iterator[Hosts]:
    """Two virtual hosts."""
    with virtual_hosts(folder, 2) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def prompts(folder: Path) -> Path:
    """Rows of every kind."""
    return write_rows(folder / "in.jsonl", varied_rows(demo_prompts(12)))


@pytest.fixture(scope="module")
def expected(folder: Path, prompts: Path) -> str:
    """Digest of what one rank gives."""
    output = folder / "one.jsonl"
    run = run_job(0, "--model", DEMO_MODEL, "--input", prompts, "--output", output, *FLAGS)
    assert run.rc == 0, run.stderr
    return digest(output)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def start(hosts: Hosts, launcher: list[str], *words: "str | Path") -> "subprocess.CompletedProcess[str]":
    """Run hpcinfer on virtual hosts."""
    argv = [*launcher, sys.executable, "-m", *map(str, words)]
    run = subprocess.run(argv, capture_output=True, text=True, env=hosts.environment, timeout=100)
    assert run.returncode == 0, run.stdout + run.stderr
    return run


@pytest.mark.parametrize(("ranks", "by", "mesh", "places", "crossing"), [
    ("vh0:2,vh1:2", "node", ("-tp", "2"), [(0, 0), (1, 0), (0, 1), (1, 1)], "all 2 inside a node"),
    ("vh0:1,vh1:3", "slot", ("-tp", "2", "-pp", "2"), [(0, 0), (0, 1)] * 2, "1 inside a node, 1 across nodes"),
    ("vh0:1,vh1:2", "slot", ("-tp", "2", "--spare-ranks", "1"), [(None, None), (0, 0), (0, 1)], "inside a node"),
])  # fmt: skip
def test_tp_groups_are_inside_hosts_where_ranks_allow_it(
    hosts: Hosts, folder: Path, prompts: Path, expected: str, ranks: str, by: str, mesh: tuple[str, ...],
    places: list[tuple[int, int]], crossing: str,
) -> None:  # fmt: skip
    tolerant = fault_tolerance() if "--spare-ranks" in mesh else ()
    number = sum(int(part.partition(":")[2]) for part in ranks.split(","))
    launcher = hosts.mpiexec(ranks, *tolerant, "--map-by", by, "-n", str(number))
    output = folder / f"{ranks.replace(':', '-')}.jsonl"
    words = ("--model", DEMO_MODEL, "--input", prompts, "--output", output, *mesh, *FLAGS)
    run = start(hosts, launcher, "hpcinfer.run", *words)
    assert digest(output) == expected
    assert f"tp groups: {crossing}" in run.stderr, run.stderr
    (report,) = (output.with_name(f"{output.name}.job") / "reports").glob("*.json")
    found = json.loads(report.read_text())["run"]["placement"]
    assert [place["rank"] for place in found] == list(range(number))
    assert {(place["host"], place["node"]) for place in found} == {("vh0", 0), ("vh1", 1)}
    assert [(place["dp"], place["tp"]) for place in found] == places


def test_doctor_says_where_replicas_are_and_measures_both_levels(hosts: Hosts) -> None:
    launcher = hosts.mpiexec("vh0:1,vh1:3", "-n", "4")
    said = start(hosts, launcher, "hpcinfer.doctor", "-tp", "2").stdout
    assert "4 ranks on 2 nodes, 1,3 on each" in said and "tp groups: 1 inside a node, 1 across nodes" in said
    assert "within nodes: 3 pairs" in said and "between nodes: 3 pairs" in said


def test_evaluation_is_the_same_on_hosts(hosts: Hosts, folder: Path) -> None:
    text = folder / "text.txt"
    text.write_text(" ".join(demo_prompts(6)))
    words = ("--model", str(DEMO_MODEL), "--text", str(text), "--max-model-len", "32", "--json")
    launcher = hosts.mpiexec("vh0:2,vh1:2", "--map-by", "node", "-n", "4")
    there = start(hosts, launcher, "hpcinfer.evaluate", *words, "-tp", "2").stdout
    assert json.loads(there) == json.loads(run_job(0, *words, module="hpcinfer.evaluate").stdout)
