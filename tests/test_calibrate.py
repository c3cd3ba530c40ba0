"""`hpcinfer calibrate` under a launcher, and alone."""

import json
import sys
from pathlib import Path

import pytest
from jobs import mpiexec_command, start_mpi

from hpcinfer.__main__ import main
from hpcinfer.calibrate import _lines
from hpcinfer.comm.node.library import load
from hpcinfer.comm.selector import Point


def test_ranks_measure_and_keep_the_table(tmp_path: Path) -> None:
    mpiexec_command()  # or skip
    argv = [sys.executable, "-m", "hpcinfer", "calibrate", "--time-limit", "1", "--json"]
    run = start_mpi(2, argv, {"HPCINFER_CACHE": str(tmp_path)}).wait(60)
    assert run.rc == 0, run.stderr
    said = json.loads(run.stdout)
    (path,) = tmp_path.iterdir()
    assert said["path"] == str(path) and json.loads(path.read_text())["shapes"] == said["shapes"]
    assert set(said["shapes"]["2"]["all_reduce"]) == {"one_shot", "two_shot"}
    assert load() is None or set(said["shapes"]["2"]["send"]) == {"node", "mpi"}


def test_a_folder_that_cannot_be_written_is_said_and_no_error(tmp_path: Path) -> None:
    mpiexec_command()  # or skip
    (tmp_path / "file").write_text("")
    argv = [sys.executable, "-m", "hpcinfer", "calibrate", "--time-limit", "0.5"]
    run = start_mpi(2, argv, {"HPCINFER_CACHE": str(tmp_path / "file")}).wait(60)
    assert run.rc == 0 and "ranks on nodes: 2" in run.stdout and "cannot be kept" in run.stderr


@pytest.mark.parametrize("arguments, said", [([], "one rank"), (["--time-limit", "0"], "more than 0")])
def test_one_rank_and_no_time_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", *arguments]) != 0
    assert said in capsys.readouterr().err


def test_the_fastest_form_of_a_size_has_a_star() -> None:
    curves = {"leader": [Point(1024, 2e-6)], "one_shot": [Point(1024, 3e-6), Point(4096, 5e-6)]}
    lines = _lines({"2+2": {"all_reduce": curves, "send": {"mpi": [Point(1024, 7e-6)]}}})
    assert lines[1] == "ranks on nodes: 2+2" and lines[2].split() == ["all_reduce", "leader", "one_shot"]
    assert lines[3].split() == ["1.0", "KiB", "2", "us*", "3", "us"]
    assert lines[4].split() == ["4.0", "KiB", "5", "us*"]
    assert lines[5].split() == ["send", "mpi"] and lines[6].split() == ["1.0", "KiB", "7", "us*"]
