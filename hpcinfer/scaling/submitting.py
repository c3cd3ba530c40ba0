"""Submitting: one batch job for each number of nodes and ranks, which runs everything of this shape."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import hpcinfer
from hpcinfer.errors import ConfigError, HpcInferError
from hpcinfer.scaling.plan import Shape
from hpcinfer.scaling.study import Study
from hpcinfer.supervision.launchers import Command

log = logging.getLogger(__name__)

_TIMEOUT_S = 60.0


def missing_shapes(study: Study) -> list[Shape]:
    """Shapes of which a run is not done, small ones first."""
    return sorted({run.point.shape for run in study.runs() if not run.is_done})


def batch_job(study: Study, shape: Shape, options: Sequence[str], environment: Mapping[str, str]) -> Command:
    """Say how the job of a shape is submitted.

    Raises:
        ConfigError: the script is not there.
    """
    root = Path(environment.get("HPCINFER_ROOT") or Path(hpcinfer.__file__).parents[1]).absolute()
    script = root / "slurm" / "scaling.sbatch"
    if not script.is_file():
        raise ConfigError(f"no {script}", expected="a checkout", hint="HPCINFER_ROOT=/path/to/it")
    argv = [
        "sbatch", "--parsable", f"--nodes={shape.nodes}", f"--ntasks-per-node={shape.ranks_per_node}",
        f"--output={study.folder}/jobs/%x-%j.out", *options, str(script),
    ]  # fmt: skip
    own = {"STUDY": str(study.folder), "HPCINFER_ROOT": str(root)}
    return Command(argv, {"HPCINFER_VENV": sys.prefix, **environment, **own})


def submit(study: Study, options: Sequence[str]) -> list[str]:
    """Submit what is missing; returns the numbers of the jobs.

    Raises:
        ConfigError: no sbatch here.
        HpcInferError: Slurm refuses a job.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("no sbatch here", expected="a login node of Slurm", hint="without --submit it runs here")
    (study.folder / "jobs").mkdir(exist_ok=True)
    return [_submit(batch_job(study, shape, options, os.environ), shape) for shape in missing_shapes(study)]


def _submit(job: Command, shape: Shape) -> str:
    done = subprocess.run(job.argv, env=job.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=_TIMEOUT_S, check=False)  # fmt: skip
    if done.returncode:
        raise HpcInferError(f"sbatch refuses the job of {shape}: {done.stderr.strip()}",
                            hint="--sbatch-option gives what the site asks for; the same command submits the rest")
    log.info("%s: job %s", shape, done.stdout.strip())
    return done.stdout.strip().partition(";")[0]  # the name of the cluster may follow
