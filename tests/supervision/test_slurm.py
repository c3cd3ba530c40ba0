"""What a supervisor asks of Slurm, with a scontrol that is a script."""

import os
from pathlib import Path

import pytest

from hpcinfer.errors import ConfigError
from hpcinfer.supervision.nodes import Node
from hpcinfer.supervision.slurm import Allocation

SCRIPT = """#!/usr/bin/env bash
echo "$@" >> {log}
if [ -n "$REFUSE" ]; then echo "scontrol: error: $REFUSE" >&2; exit 1; fi
case "$1 $2" in
"show hostnames") printf 'n1\\nn2\\nn3\\n' ;;
"show node")
    echo 'NodeName=n1 Arch=x86_64 CPUTot=2 State=ALLOCATED ThreadsPerCore=1 Reason=State=DOWN'
    echo 'NodeName=n2 Arch=x86_64 CPUTot=2 State=DOWN*+NOT_RESPONDING ThreadsPerCore=1'
    echo 'NodeName=n3 Arch=x86_64 CPUTot=2 State=MIXED+DRAIN ThreadsPerCore=1' ;;
"update JobId=7") touch slurm_job_7_resize.sh ;;
esac
"""


@pytest.fixture
def environment(tmp_path):
    script, bin_folder = tmp_path / "bin" / "scontrol", tmp_path / "bin"
    bin_folder.mkdir()
    script.write_text(SCRIPT.format(log=tmp_path / "log"))
    script.chmod(0o755)
    return {"PATH": f"{bin_folder}:{os.defpath}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]"}


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().splitlines()


def test_nodes_have_the_tasks_that_were_asked_for(environment, tmp_path):
    tasks = {**environment, "SLURM_TASKS_PER_NODE": "4(x2),3"}
    assert Allocation(tasks).nodes(None) == [Node("n1", 4), Node("n2", 4), Node("n3", 3)]
    assert calls(tmp_path) == ["show hostnames n[1-3]"]
    assert Allocation(tasks).nodes(2) == [Node("n1", 2), Node("n2", 2), Node("n3", 2)]
    assert Allocation(environment).nodes(None) == [Node("n1", 1), Node("n2", 1), Node("n3", 1)]


def test_nodes_that_are_down_are_found(environment, tmp_path):
    assert Allocation(environment).down(["n1", "n2", "n3"]) == {"n2"}
    assert calls(tmp_path) == ["show node n1,n2,n3 --oneliner"]


def test_nodes_are_given_back_and_nothing_is_left_here(environment, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert Allocation(environment).shrink(["n1", "n3"])
    assert calls(tmp_path) == ["update JobId=7 NodeList=n1,n3"]
    assert list(here.iterdir()) == []


def test_slurm_that_refuses_or_is_away_stops_nothing(environment):
    refusing = Allocation({**environment, "REFUSE": "Access denied"})
    assert not refusing.shrink(["n1"])
    assert refusing.down(["n1"]) == set()
    with pytest.raises(ConfigError, match="which nodes"):
        refusing.nodes(None)
    away = Allocation({**environment, "PATH": "/nowhere"})
    assert not away.shrink(["n1"]) and away.down(["n1"]) == set()
