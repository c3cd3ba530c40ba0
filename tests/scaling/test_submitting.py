"""Batch jobs of a study, with a sbatch that is a script."""

import os
import subprocess

import pytest
from made_up_study import made_up_report, small_study, write_run
from sources import CHECKOUT

from hpcinfer.errors import ConfigError, HpcInferError
from hpcinfer.scaling.options import StudyOptions
from hpcinfer.scaling.plan import Recipe, Shape
from hpcinfer.scaling.submitting import batch_job, missing_shapes, submit

SBATCH = """#!/bin/sh
[ -z "$REFUSE" ] || { echo "sbatch: error: $REFUSE" >&2; exit 1; }
echo "$STUDY $HPCINFER_ROOT $*" >>CALLS
echo "$(wc -l <CALLS);cluster"
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(SBATCH.replace("CALLS", str(tmp_path / "calls")))
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.defpath}")
    study = small_study(tmp_path / "study", tmp_path / "in", Recipe(), Recipe(tp="node"),
                        shapes=(Shape(2, 2), Shape(1, 2)))  # fmt: skip
    study.save()
    return study


def test_one_job_for_each_shape(study, tmp_path):
    assert submit(study, StudyOptions(sbatch_option=("--time=30", "--account=x"))) == ["1", "2"]
    small, large = (tmp_path / "calls").read_text().splitlines()
    assert small == (f"{study.folder} {CHECKOUT} --parsable --nodes=1 --ntasks-per-node=2"
                     f" --output={study.folder}/jobs/%x-%j.out --time=30 --account=x {CHECKOUT}/slurm/scaling.sbatch")
    assert "--nodes=2 --ntasks-per-node=2" in large and (study.folder / "jobs").is_dir()


def test_what_is_done_is_not_submitted(study):
    for run in study.runs(Shape(1, 2)):
        write_run(run, 2.0, made_up_report(2, 1.0))
    assert missing_shapes(study) == [Shape(2, 2)] and submit(study, StudyOptions()) == ["1"]


def test_refusal_is_told(study, monkeypatch):
    monkeypatch.setenv("REFUSE", "invalid account")
    with pytest.raises(HpcInferError, match="job of 1x2: sbatch: error: invalid account"):
        submit(study, StudyOptions())


def test_one_shape_alone_is_submitted(study):
    assert submit(study, StudyOptions(), Shape(2, 2)) == ["1"]


def test_what_is_still_queued_is_not_submitted_again(study, tmp_path):
    squeue = tmp_path / "bin/squeue"
    squeue.write_text("#!/bin/sh\necho 12\necho 1\n")
    squeue.chmod(0o755)
    assert submit(study, StudyOptions()) == ["1", "2"]
    assert missing_shapes(study) == [Shape(2, 2)] and submit(study, StudyOptions()) == ["3"]
    squeue.write_text("#!/bin/sh\nexit 1\n")
    assert missing_shapes(study) == [Shape(1, 2), Shape(2, 2)]


def test_job_starts_its_runs_as_it_was_asked(study):
    options = StudyOptions(launcher="mpiexec", run_timeout=30.0)
    job = batch_job(study, Shape(1, 2), options, {"OPTIONS": "--plots png"})
    assert job.environment["OPTIONS"] == "--plots png --launcher=mpiexec --run-timeout=30.0"
    assert "OPTIONS" not in batch_job(study, Shape(1, 2), StudyOptions(), {}).environment


def test_no_sbatch_and_no_script_are_named(study, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"no .*scaling\.sbatch"):
        batch_job(study, Shape(1, 2), StudyOptions(), {"HPCINFER_ROOT": str(tmp_path)})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sbatch here"):
        submit(study, StudyOptions())


def test_job_runs_what_has_its_shape(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text('#!/bin/sh\necho "$*"\n')
    (tmp_path / "bin/python").chmod(0o755)
    environment = {"PATH": os.defpath, "HPCINFER_VENV": str(tmp_path), "SLURM_JOB_NUM_NODES": "4",
                   "SLURM_NTASKS_PER_NODE": "2", "STUDY": "a study", "OPTIONS": "--launcher mpiexec"}
    run = subprocess.run(["bash", CHECKOUT / "slurm/scaling.sbatch"], env=environment, capture_output=True, text=True)
    assert run.stdout == "-m hpcinfer study --output a study --only 4x2 --launcher mpiexec\n", run.stderr
