"""What a rank asks of the file system until its first token: what one rank has read, the others are told."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from golden import DEMO_MODEL, demo_prompts, read_output, write_rows
from jobs import run_job, start_mpi


class Recorded(NamedTuple):
    """Two ranks of one replica."""

    leader: dict[str, Any]
    follower: dict[str, Any]
    report: dict[str, Any]

    def packages(self, rank: dict[str, Any]) -> set[str]:
        """Packages that a rank has imported."""
        return {name.split(".")[0] for name in rank["modules"]}


@pytest.fixture(scope="module")
def recorded(folder: Path) -> Recorded:
    """A job whose store was there, on two ranks of one replica."""
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": text, "max_tokens": 3} for text in demo_prompts(4)])
    flags = ["--model", str(DEMO_MODEL), "--input", str(prompts), "-tp", "2"]
    assert run_job(2, *flags, "--output", folder / "first.jsonl").rc == 0
    argv = [sys.executable, str(Path(__file__).with_name("recorded_rank.py")), *flags]
    done = start_mpi(2, [*argv, "--output", str(folder / "out.jsonl")], cwd=folder).wait()
    assert done.rc == 0, done.stderr
    ranks = [json.loads((folder / f"recorded.{rank}").read_text()) for rank in range(2)]
    return Recorded(*ranks, read_output(folder / "out.jsonl").report)


def test_a_follower_imports_nothing_that_only_leaders_and_readers_of_metadata_need(recorded: Recorded) -> None:
    spared = {"h5py", "jinja2", "tokenizers"}
    assert spared <= recorded.packages(recorded.leader)
    assert not {*spared, "torch", "tqdm", "safetensors", "transformers"} & recorded.packages(recorded.follower)
    assert "torch" not in recorded.packages(recorded.leader)


def test_modules_come_from_the_root(recorded: Recorded) -> None:
    of_leader, of_follower = (
        [path for path in rank["opened"] if path.endswith((".py", ".pyc"))] for rank in recorded[:2]
    )
    assert len(of_leader) > 300 and "hpcinfer.engine.engine" in recorded.follower["modules"]
    assert not of_follower, "name these modules in hpcinfer/run.py, that the root imports them for all"


def test_no_other_rank_opens_an_index_or_the_manifest(recorded: Recorded) -> None:
    def count(rank: dict[str, Any], name: str) -> int:
        return sum(Path(path).name == name for path in rank["opened"])

    assert count(recorded.follower, "index.h5") == 0
    assert count(recorded.follower, "manifest.json") == 0 < count(recorded.leader, "manifest.json")


def test_each_rank_reports_its_start(recorded: Recorded) -> None:
    for rank in recorded.report["ranks"]:
        seconds = rank["startup"]["seconds"]
        assert list(seconds) == ["world", "modules", "set up", "built", "first token"]
        assert sorted(seconds.values()) == list(seconds.values()) and 0 < seconds["world"] < seconds["first token"]
    leader, follower = (rank["startup"]["read_calls"] for rank in recorded.report["ranks"])
    assert follower < leader / 2
