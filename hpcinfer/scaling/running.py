"""Running: one run after the other on the hosts at hand. What fails is kept with its reason, and the others go on."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from hpcinfer.recovery.leases import incarnation_name
from hpcinfer.scaling.claim import KEPT
from hpcinfer.scaling.cores import Cores, count_cores, threads_of
from hpcinfer.scaling.inputs import input_file, write_input
from hpcinfer.scaling.plan import Shape
from hpcinfer.scaling.site import Site
from hpcinfer.scaling.study import Run, Study, write_json
from hpcinfer.supervision.launchers import Command
from hpcinfer.supervision.nodes import Placement
from hpcinfer.supervision.step import LaunchedStep

log = logging.getLogger(__name__)

_LOOK_S = 0.01
_GRACE_S = 10.0
_PROBE_S = 60.0
TIMED_OUT = 124  # exit code, as of timeout(1)


def run_program(study: Study, run: Run) -> list[str]:
    """The command line of a run, without its launcher."""
    mesh = run.point.recipe.mesh(run.point.shape)
    source = input_file(study.folder / "inputs", Path(study.input), run.point.rows)
    return [
        sys.executable, "-m", "hpcinfer.run", f"--model={study.model}", f"--input={source}", f"--output={run.output}",
        *study.flags, f"-dp={mesh.dp}", f"-pp={mesh.pp}", f"-tp={mesh.tp}",
    ]  # fmt: skip


def cores_file(study: Study, shape: Shape) -> Path:
    """Where it is kept what cores the ranks of a shape have."""
    return study.folder / "cores" / f"{shape}.json"


@dataclass
class Runner:
    """Starts the runs of a study."""

    study: Study
    site: Site
    timeout_s: float | None = None
    _cores: dict[Shape, Cores | None] = field(default_factory=dict)

    def run_all(self, runs: Sequence[Run]) -> None:
        """Run what is not done yet; runs whose nodes are not here, and those of another process, are left out."""
        for number, run in enumerate(runs, 1):
            if not run.is_done:
                with run.claimed() as is_ours:
                    if is_ours and not run.is_done:
                        self._run(run, f"run {number} of {len(runs)}, {run.point.run_name()}")
                    elif not is_ours:
                        log.warning("%s is run by another process", run.folder)

    def command(self, step: str, run: Run) -> Command | None:
        """Say how a run is started; None if its nodes are not here."""
        placement, cores = self.site.placement(run.point.shape), self._cores.get(run.point.shape)
        if placement is None:
            return None
        shares_cores = cores is not None and run.point.shape.ranks * cores.threads > cores.num_cores
        return self.site.command(step, placement, run_program(self.study, run), shares_cores=shares_cores)

    def _run(self, run: Run, words: str) -> None:
        placement = self.site.placement(run.point.shape)
        if placement is None:
            log.warning("%s: %d nodes are not here", words, run.point.shape.nodes)
            return
        self._look_at(run.point.shape, placement)
        write_input(self.study.folder / "inputs", Path(self.study.input), run.point.rows)
        _clear(run)
        step, started = f"{incarnation_name()}-study", datetime.now(timezone.utc)
        command = self.command(step, run)
        assert command is not None
        with open(run.log, "wb") as file:
            exit_code, seconds = _wait(LaunchedStep(step, command, file), self.timeout_s)
        write_json(run.ending, {"exit_code": exit_code, "seconds": seconds, "started": started.isoformat(),
                                "command": command.argv})  # fmt: skip
        ended = "done" if run.is_done else f"failed with {exit_code}" if exit_code else "failed, it left no report"
        log.info("%s: %s after %.1f s", words, ended, seconds)

    def _look_at(self, shape: Shape, placement: Placement) -> None:
        """Find out what cores the ranks of a shape have, once."""
        if shape in self._cores:
            return
        threads = threads_of(self.study.flags)
        step = f"{incarnation_name()}-cores"
        program = [sys.executable, "-m", "hpcinfer.scaling.cores", *([str(threads)] if threads else [])]
        command = self.site.command(step, placement, program, shares_cores=True)
        path = cores_file(self.study, shape)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".log"), "w+b") as file:
            _wait(LaunchedStep(step, command, file), _PROBE_S)
            file.seek(0)
            cores = self._cores[shape] = count_cores(file.read().decode(errors="replace"))
        if cores:
            write_json(path, cores._asdict())


def _wait(step: LaunchedStep, timeout_s: float | None) -> tuple[int, float]:
    """Wait for the end of a step; ends it when that takes too long, or when we are ended."""
    start = time.monotonic()
    try:
        while (code := step.poll()) is None:
            time.sleep(_LOOK_S)
            if timeout_s is not None and time.monotonic() - start > timeout_s:
                return TIMED_OUT, time.monotonic() - start
        return code, time.monotonic() - start
    finally:
        _end(step)


def _end(step: LaunchedStep) -> None:
    for _ in range(2):  # asked, then killed
        if step.poll() is None:
            step.end()
            end = time.monotonic() + _GRACE_S
            while step.poll() is None and time.monotonic() < end:
                time.sleep(_LOOK_S)
    step.bury()


def _clear(run: Run) -> None:
    """Remove what an earlier start of this run has left: a run that resumes measures nothing."""
    for path in run.folder.iterdir():
        if not path.is_dir():
            path.unlink()
        elif path.name not in KEPT:
            shutil.rmtree(path)
