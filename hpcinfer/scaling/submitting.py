"""Submitting: one batch job for each number of nodes and ranks, which runs everything of this shape."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import hpcinfer
from hpcinfer.errors import ConfigError, HpcInferError
from hpcinfer.scaling.options import StudyOptions
from hpcinfer.scaling.plan import Shape, parse_shape
from hpcinfer.scaling.study import Study, read_json, write_json
from hpcinfer.supervision.launchers import Command

log = logging.getLogger(__name__)

_TIMEOUT_S = 60.0
_SCRIPT = Path("slurm") / "scaling.sbatch"


def missing_shapes(study: Study, only: Shape | None = None) -> list[Shape]:
    """Shapes of which a run is not done and no job that we know of is queued, small ones first."""
    queued = _queued(study)
    return sorted({run.point.shape for run in study.runs(only) if not run.is_done} - queued)


def batch_job(study: Study, shape: Shape, options: StudyOptions, environment: Mapping[str, str]) -> Command:
    """Say how the job of a shape is submitted; its command gets what these options say of starting runs.

    Raises:
        ConfigError: the script is not there.
    """
    root = _checkout(environment)
    argv = [
        "sbatch", "--parsable", f"--nodes={shape.nodes}", f"--ntasks-per-node={shape.ranks_per_node}",
        f"--output={study.folder}/jobs/%x-%j.out", *options.sbatch_option, str(root / _SCRIPT),
    ]  # fmt: skip
    more = [environment["OPTIONS"]] if environment.get("OPTIONS") else []
    more += [f"--launcher={options.launcher}"] if options.launcher != "auto" else []
    more += [f"--run-timeout={options.run_timeout}"] if options.run_timeout is not None else []
    own = {"STUDY": str(study.folder), "HPCINFER_ROOT": str(root), **({"OPTIONS": " ".join(more)} if more else {})}
    return Command(argv, {"HPCINFER_VENV": sys.prefix, **environment, **own})


def _checkout(environment: Mapping[str, str]) -> Path:
    """Where the batch script is: as told, here, or beside the package or its virtual environment."""
    told = environment.get("HPCINFER_ROOT")
    places = [told] if told else [Path.cwd(), Path(hpcinfer.__file__).parents[1], Path(sys.prefix).parent]
    roots = [Path(place).absolute() for place in places]
    for root in roots:
        if (root / _SCRIPT).is_file():
            return root
    raise ConfigError(f"no {_SCRIPT} in {' or '.join(map(str, roots))}", expected="a checkout",
                      hint="HPCINFER_ROOT=/path/to/it")  # fmt: skip


def submit(study: Study, options: StudyOptions, only: Shape | None = None) -> list[str]:
    """Submit what is missing and not queued; returns the numbers of the jobs.

    Raises:
        ConfigError: no sbatch here.
        HpcInferError: Slurm refuses a job.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("no sbatch here", expected="a login node of Slurm", hint="without --submit it runs here")
    (study.folder / "jobs").mkdir(exist_ok=True)
    numbers = []
    for shape in missing_shapes(study, only):
        number = _submit(batch_job(study, shape, options, os.environ), shape)
        write_json(_submitted(study), {**read_json(_submitted(study)), str(shape): number})
        numbers.append(number)
    return numbers


def _submitted(study: Study) -> Path:
    """Where the number of the last job of each shape is kept."""
    return study.folder / "jobs" / "submitted.json"


def _queued(study: Study) -> set[Shape]:
    """Shapes whose job waits or runs, as far as Slurm says it here."""
    submitted = read_json(_submitted(study))
    if not submitted or shutil.which("squeue") is None:
        return set()
    done = subprocess.run(["squeue", "--me", "--noheader", "--format=%A"], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)  # fmt: skip
    queued = {shape: number for shape, number in submitted.items() if number in done.stdout.split()}
    for shape, number in queued.items():
        log.info("%s: job %s is still queued", shape, number)
    return set(map(parse_shape, queued))


def _submit(job: Command, shape: Shape) -> str:
    done = subprocess.run(job.argv, env=job.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=_TIMEOUT_S, check=False)  # fmt: skip
    if done.returncode:
        raise HpcInferError(f"sbatch refuses the job of {shape}: {done.stderr.strip()}",
                            hint="--sbatch-option gives what the site asks for; the same command submits the rest")
    log.info("%s: job %s", shape, done.stdout.strip())
    return done.stdout.strip().partition(";")[0]  # the name of the cluster may follow
