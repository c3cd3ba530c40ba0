"""The engines that are compared, each started as a program of its own; their loading is not part of their time."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from workload import Workload

HERE = Path(__file__).resolve().parent
THREADS_PER_RANK = 1
_BREAKDOWN = {  # phases of benchmarks/timed_run.py
    "products": ("products",),
    "attention": ("attention",),
    "other kernels": ("other kernels",),
    "sampling": ("sampling",),
    "communication": ("communication", "pipeline", "waiting for the leader", "waiting for results"),
    "scheduling": ("scheduling",),
    "Python around kernels": ("forward",),
    "input and output": ("input and output",),
}
_REST = "other Python, start, end"


class Mesh(NamedTuple):
    """Sizes of the axes of a job."""

    dp: int
    pp: int
    tp: int

    def __str__(self) -> str:
        return "x".join(map(str, self))

    @property
    def ranks(self) -> int:
        """Ranks of the job."""
        return self.dp * self.pp * self.tp

    @property
    def threads(self) -> int:
        """Threads of all ranks together."""
        return self.ranks * THREADS_PER_RANK


class JobResult(NamedTuple):
    """What a job of hpcinfer gave."""

    seconds: float  # of its run, without loading and merging
    report: dict[str, Any]
    output: bytes


class PeerResult(NamedTuple):
    """What transformers gave."""

    seconds: float
    token_ids: list[list[int]]
    margins: list[float] | None  # see benchmarks/peer_transformers.py


@dataclass(frozen=True)
class Bench:
    """One model and one workload, ready for all engines."""

    model: Path  # Hugging Face folder
    workload: Workload
    job_input: Path
    workload_file: Path
    folder: Path  # for what the engines write
    job_options: list[str]
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def run_job(self, mesh: Mesh, *, is_timed: bool = False) -> JobResult:
        """Run a job of hpcinfer; a timed one reports phases that exclude each other."""
        output = self.folder / f"{next(self.numbers)}.jsonl"
        program = [os.fspath(HERE / "timed_run.py")] if is_timed else ["-m", "hpcinfer.run"]
        options = {
            "model": self.model, "input": self.job_input, "output": output, "data-parallel-size": mesh.dp,
            "pipeline-parallel-size": mesh.pp, "tensor-parallel-size": mesh.tp, "dtype": "float32",
            "temperature": 0, "max-tokens": self.workload.output_tokens,
        }  # fmt: skip
        flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        launcher = [os.fspath(HERE.parent / "launch" / "local.sh"), str(mesh.ranks), sys.executable]
        environment = {"HPCINFER_CACHE": os.fspath(self.folder / "cache"), "HPCINFER_THREADS": str(THREADS_PER_RANK)}
        self._run([*launcher, *program, *flags, "--ignore-eos", "--fail-on-error", *self.job_options], environment)
        (report_path,) = Path(f"{output}.job", "reports").iterdir()
        report = json.loads(report_path.read_text())
        return JobResult(report["run"]["seconds"]["run"], report, output.read_bytes())

    def run_transformers(self, threads: int, *, with_margins: bool = False) -> PeerResult:
        """Run transformers' `generate`."""
        result = self.folder / f"{next(self.numbers)}.json"
        files = [HERE / "peer_transformers.py", self.model, self.workload_file, result]
        flags = ["--threads", str(threads), *(["--margins"] if with_margins else [])]
        environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self._run([sys.executable, *map(os.fspath, files), *flags], environment)
        values = json.loads(result.read_text())
        return PeerResult(values["seconds"], values["token_ids"], values["margins"])

    def _run(self, argv: list[str], environment: dict[str, str]) -> None:
        environment = {**os.environ, **environment}
        mpirun = Path(sys.executable).with_name("mpirun")
        if mpirun.exists():
            environment.setdefault("HPCINFER_MPIRUN", os.fspath(mpirun))
        run = subprocess.run(
            argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=self.folder, env=environment
        )
        if run.returncode != 0:
            raise SystemExit(f"{' '.join(argv)}\nended with {run.returncode}:\n{run.stdout}{run.stderr}")


def has_transformers() -> bool:
    """Whether there is something to compare with."""
    return importlib.util.find_spec("transformers") is not None


def breakdown(result: JobResult) -> dict[str, float]:
    """Seconds of a timed run by kind, means over the ranks; they add up to the run."""
    ranks = [rank["seconds"] for rank in result.report["ranks"]]
    kinds = {
        kind: mean(sum(rank.get(phase, 0.0) for phase in phases) for rank in ranks)
        for kind, phases in _BREAKDOWN.items()
    }
    return {**kinds, _REST: result.seconds - sum(kinds.values())}
