"""The batch scripts of slurm/ without Slurm: what they start, with stand-ins that only say how they were called."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from sources import CHECKOUT

SCRIPTS = sorted((CHECKOUT / "slurm").glob("*.sbatch"))
RUN = "python -m hpcinfer.run --model a model --input in --output completions.jsonl{} -tp 2"
STARTED = {
    "apptainer": "bind.sh apptainer exec --bind /here --nv an.sif " + RUN.format(""),
    "gpu": "bind.sh " + RUN.format(" --device cuda"),
    "helpers": "bind.sh " + RUN.format(""),
    "hpcinfer": "bind.sh " + RUN.format(""),
    "requeue": "bind.sh " + RUN.format(" --requeue"),
    "scaling": "python -m hpcinfer study --output a study --only 2x2 -tp 2",
    "supervise": RUN.format(" --requeue").replace("hpcinfer.run", "hpcinfer supervise"),
}


def start(folder: Path, script: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a batch script as Slurm would, in an allocation of two nodes."""
    for name in ("srun", "mpirun", "apptainer", "python", "module"):
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "{name} $*"\n')
        path.chmod(0o755)
    environment = {"PATH": f"{folder}/bin:/usr/bin:/bin", "HPCINFER_VENV": str(folder), "SLURM_JOB_ID": "1",
                   "SLURM_SUBMIT_DIR": str(CHECKOUT), "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NUM_NODES": "2",
                   **variables}
    return subprocess.run(["bash", script], env=environment, cwd=folder, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_starts_the_job(script: Path, tmp_path: Path) -> None:
    variables = {"MODEL": "a model", "INPUT": "in", "OPTIONS": "-tp 2", "IMAGE": "an.sif", "HPCINFER_BINDS": "/here",
                 "HPCINFER_APPTAINER_FLAGS": "--nv", "HPCINFER_MODULES": "first second", "STUDY": "a study"}
    run = start(tmp_path, script, **variables)
    assert run.returncode == 0, run.stderr
    modules, started = run.stdout.splitlines()[0], run.stdout.splitlines()[-1]
    assert modules == "module load first second"
    assert started.endswith(STARTED[script.stem])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_says_what_is_missing(script: Path, tmp_path: Path) -> None:
    run = start(tmp_path, script, MODEL="m", IMAGE="an.sif")
    assert run.returncode != 0
    assert re.search("(INPUT|STUDY): sbatch .*--export=ALL,", run.stderr)


@pytest.mark.parametrize("script", ["gpu", "helpers", "hpcinfer", "requeue"])
def test_mpirun_starts_as_many_ranks_on_a_node(script: str, tmp_path: Path) -> None:
    path = CHECKOUT / f"slurm/{script}.sbatch"
    run = start(tmp_path, path, MODEL="m", INPUT="i", HPCINFER_LAUNCHER="mpirun")
    assert "mpirun -ppn 2 -n 2" in run.stdout, run.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_names_nothing_of_a_site(script: Path) -> None:
    text = script.read_text()
    directives = re.findall(r"^#SBATCH --([\w-]+)", text, re.MULTILINE)
    assert not {"account", "partition", "qos", "constraint", "reservation", "mail-user"} & set(directives)
    assert not re.findall(r"^#SBATCH.* /", text, re.MULTILINE)
    assert text.splitlines()[-1].startswith(("exec ", "    python"))
    assert os.linesep + "exec " in text
