"""The engines that are compared, each started as a program of its own; peers load before their clock starts."""

import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from contenders import JobContender, PeerContender
from processes import run_program
from roofline import Peaks
from workload import Workload

HERE = Path(__file__).resolve().parent
_OFFLINE = {"HF_HUB_OFFLINE": "1", "OPENVINO_TELEMETRY": "0", "DO_NOT_TRACK": "1"}


class JobResult(NamedTuple):
    """What a job of hpcinfer gave."""

    seconds: float  # of its run, without loading and merging
    peak_bytes: int
    report: dict[str, Any]
    output: bytes


class PeerResult(NamedTuple):
    """What another engine gave."""

    seconds: float
    peak_bytes: int
    token_ids: list[list[int]]
    versions: dict[str, str]
    margins: list[float] | None  # see benchmarks/peers/run_transformers.py


@dataclass(frozen=True)
class Bench:
    """One model and one workload, ready for all engines; what they need of the model is made when first asked for."""

    model: Path  # Hugging Face folder
    workload: Workload
    job_input: Path
    workload_file: Path
    folder: Path  # for what the engines write
    peers: Path | None  # root of the peers' environments
    job_options: list[str]
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def run_job(self, contender: JobContender, *, is_timed: bool = False) -> JobResult:
        """Run a job of hpcinfer; a timed one reports phases that exclude each other."""
        output = self.folder / f"{next(self.numbers)}.jsonl"
        program = [os.fspath(HERE / "timed_run.py")] if is_timed else ["-m", "hpcinfer.run"]
        mesh, threads = contender.mesh, contender.threads_per_rank
        options = {
            "model": self._store(contender.precision), "input": self.job_input, "output": output,
            "data-parallel-size": mesh.dp, "pipeline-parallel-size": mesh.pp, "tensor-parallel-size": mesh.tp,
            "threads": threads, "dtype": "float32", "max-tokens": self.workload.output_tokens,
            "temperature": self.workload.temperature, "top-p": self.workload.top_p,
        }  # fmt: skip
        flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        argv = [*program, *flags, "--ignore-eos", "--fail-on-error", *contender.flags, *self.job_options]
        peak_bytes = self._launch(mesh.ranks, argv, {"HPCINFER_THREADS": str(threads)})
        (report_path,) = Path(f"{output}.job", "reports").iterdir()
        report = json.loads(report_path.read_text())
        return JobResult(report["run"]["seconds"]["run"], peak_bytes, report, output.read_bytes())

    def run_peer(self, contender: PeerContender, *, with_margins: bool = False) -> PeerResult:
        """Run another engine in its environment."""
        result = self.folder / f"{next(self.numbers)}.json"
        script = HERE / "peers" / f"run_{_module(contender.peer)}.py"
        reuses = contender.reuses_prefixes and self.workload.prefix_tokens > 0
        argv = [
            *map(os.fspath, (script, self._peer_model(contender), self.workload_file, result)),
            "--threads", str(contender.threads), "--precision", contender.precision,
            *(["--reuse-prefixes"] if reuses else []), *(["--margins"] if with_margins else []),
        ]  # fmt: skip
        environment = {**_OFFLINE, "OMP_NUM_THREADS": str(contender.threads)}
        peak_bytes = run_program([self._python(contender.peer), *argv], environment, self.folder)
        values = json.loads(result.read_text())
        return PeerResult(
            values["seconds"], peak_bytes, values["token_ids"], values["versions"], values.get("margins")
        )

    def has_peer(self, peer: str) -> bool:
        """Whether a peer is installed: it has an environment of its own, or transformers is in this one."""
        return self._python(peer) != ""

    def measure_roofline(self, threads: list[int]) -> dict[int, Peaks]:
        """Measure what the machine can do now, for some numbers of threads."""
        result = self.folder / f"{next(self.numbers)}.json"
        argv = [sys.executable, os.fspath(HERE / "roofline.py"), "--json", os.fspath(result)]
        run_program([*argv, "--threads", ",".join(map(str, threads))], {}, self.folder)
        return {int(count): Peaks(**peaks) for count, peaks in json.loads(result.read_text()).items()}

    def _store(self, precision: str) -> Path:
        store = self.folder / f"{precision}.store"
        if not store.exists():
            quantize = [] if precision == "f32" else ["--quantize", precision]
            self._launch(1, ["-m", "hpcinfer.convert", *quantize, os.fspath(self.model), os.fspath(store)], {})
        return store

    def _launch(self, ranks: int, argv: list[str], environment: dict[str, str]) -> int:
        """Run Python under MPI."""
        mpirun = Path(sys.executable).with_name("mpirun")
        if mpirun.exists() and "HPCINFER_MPIRUN" not in os.environ:
            environment = {**environment, "HPCINFER_MPIRUN": os.fspath(mpirun)}
        # what a killed launcher has left in /tmp would end the next one with the same process id (Open MPI)
        environment = {**environment, "PRTE_MCA_prte_tmpdir_base": os.fspath(self.folder)}
        launcher = [os.fspath(HERE.parent / "launch" / "local.sh"), str(ranks), sys.executable]
        return run_program([*launcher, *argv], environment, self.folder)

    def _python(self, peer: str) -> str:
        """Interpreter of a peer's environment, or nothing."""
        own = self.peers / peer / "bin" / "python" if self.peers else None
        if own and own.exists():
            return os.fspath(own)
        is_here = peer == "transformers" and importlib.util.find_spec("transformers") is not None
        return sys.executable if is_here else ""

    def _peer_model(self, contender: PeerContender) -> Path:
        script = HERE / "peers" / f"prepare_{_module(contender.peer)}.py"
        if not script.exists():
            return self.model
        prepared = self.folder / f"{_module(contender.peer)}-{contender.precision}"
        if not prepared.exists():
            argv = [os.fspath(script), os.fspath(self.model), os.fspath(prepared), "--precision", contender.precision]
            run_program([self._python(contender.peer), *argv], _OFFLINE, self.folder)
        return prepared


def _module(peer: str) -> str:
    return peer.replace(".", "_")
