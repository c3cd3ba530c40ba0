"""The tree all-reduce against MPI_Allreduce, by size: on virtual hosts, and inside one node.

    python benchmarks/collectives.py --json collectives.json --plot collectives.svg
    python benchmarks/collectives.py --mpich /opt/mpich --only "4x2, 20 us, 10 Gbit/s"

The hosts are namespaces of this machine (launch/virtual_cluster.sh, which needs their permission). Contenders: what
Open MPI chooses, each of its algorithms, MPICH, each form of hpcinfer, and its selector after `hpcinfer calibrate`. In
each start of ranks all of its contenders take turns; ratios are to the selector in the same start. MPICH is that of
another environment with numpy and mpi4py: python -m venv DIR && DIR/bin/pip install mpich mpi4py numpy. The picture
needs matplotlib, and collectives_report.py draws it later, too.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from collectives_report import machine_line, markdown, plot
from virtual_hosts import Cluster, environment, mpiexec, mpiexec_on_hosts

_LIMIT_S = 1500.0  # of a start of ranks
_RANK = Path(__file__).with_name("collectives_rank.py")
_ALGORITHMS = {1: "linear", 2: "nonoverlapping", 3: "recursive doubling", 4: "ring", 5: "segmented ring",
               6: "Rabenseifner"}  # fmt: skip
_TUNED = {"OMPI_MCA_coll": "^han", "OMPI_MCA_coll_tuned_use_dynamic_rules": "1"}  # han decides by itself


class Scene(NamedTuple):
    """Where ranks run."""

    name: str
    hosts: int  # 0: this one, without namespaces
    ranks: int  # of each
    link: tuple[int, int] = (0, 0)  # µs, Mbit/s


SCENES = (
    Scene("4x2, 20 us, 10 Gbit/s", 4, 2, (20, 10000)),
    Scene("4x2, 100 us, 1 Gbit/s", 4, 2, (100, 1000)),
    Scene("one node, 2 ranks", 0, 2),
    Scene("one node, 4 ranks", 0, 4),
)


class Bench(NamedTuple):
    """One scene, brought up."""

    scene: Scene
    arguments: argparse.Namespace
    variables: dict[str, str]
    folder: Path

    def start(self, program: list[str], settings: dict[str, str], *, mpich: Path | None = None) -> str:
        """Start the ranks of the scene; returns what they print.

        Raises:
            SystemExit: they failed, with what they wrote.
        """
        count, num_ranks = max(1, self.scene.hosts), max(1, self.scene.hosts) * self.scene.ranks
        if mpich is not None:
            launcher = self._hydra(mpich, count)
        elif self.scene.hosts:
            hosts = ",".join(f"vh{i}:{self.scene.ranks}" for i in range(count))
            launcher = [*mpiexec_on_hosts(), "--host", hosts, "--bind-to", "none"]
        else:
            launcher = [mpiexec(), "--oversubscribe", "--bind-to", "none"]
        argv = [*launcher, "-n", str(num_ranks), *program]
        variables = {**self.variables, **settings}
        run = subprocess.run(argv, env=variables, cwd=self.folder, capture_output=True, text=True, timeout=_LIMIT_S)
        if run.returncode != 0:
            raise SystemExit(f"{' '.join(argv)}\nended with {run.returncode}:\n{run.stdout}{run.stderr}")
        return run.stdout

    def measure(self, contenders: list[str], settings: dict[str, str], *, mpich: Path | None = None) -> dict[str, Any]:
        """Measure some contenders in one start of ranks."""
        python = sys.executable if mpich is None else os.fspath(mpich / "bin" / "python")
        argv = [python, os.fspath(_RANK), "--contenders", *contenders, "--seconds", str(self.arguments.seconds),
                "--rounds", str(self.arguments.rounds), "--sizes", *map(str, self.arguments.sizes)]  # fmt: skip
        result: dict[str, Any] = json.loads(self.start(argv, settings, mpich=mpich).splitlines()[-1])
        return result

    def _hydra(self, mpich: Path, count: int) -> list[str]:
        own = os.fspath(mpich / "bin" / "mpiexec")
        if not self.scene.hosts:
            return [own]
        script = Path(mpiexec_on_hosts()[0])
        agent = self.folder / "agent"
        agent.write_text(f'#!/bin/sh\n[ "$1" = -x ] && shift\nexec {script} agent "$@"\n')
        agent.chmod(0o755)
        hosts = ",".join(f"vh{i}" for i in range(count))
        return [os.fspath(script), "exec", "vh0", own, "-launcher", "ssh", "-launcher-exec", os.fspath(agent),
                "-hosts", hosts, "-ppn", str(self.scene.ranks)]  # fmt: skip


def run_scene(scene: Scene, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure everything in one scene: by contender, the rows of its start of ranks."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        variables = {**os.environ, **environment(), "HPCINFER_CACHE": os.fspath(folder)}
        if scene.hosts:
            cluster = stack.enter_context(closing(Cluster(scene.hosts, folder / "cluster", scene.link)))
            variables |= cluster.environment
        bench = Bench(scene, arguments, variables, folder)
        say(f"{scene.name}: calibrating")
        calibrate = [sys.executable, "-m", "hpcinfer", "calibrate", "--json", "--time-limit", str(arguments.calibrate)]
        table = json.loads(bench.start(calibrate, {}).splitlines()[-1])
        say(f"{scene.name}: all forms")
        starts = {"": bench.measure(["all"], {})}
        for number, name in _ALGORITHMS.items() if arguments.algorithms else ():
            say(f"{scene.name}: Open MPI, {name}")
            settings = {**_TUNED, "OMPI_MCA_coll_tuned_allreduce_algorithm": str(number)}
            starts[f"Open MPI, {name}"] = bench.measure(["mpi", "auto"], settings)
        if arguments.mpich:
            say(f"{scene.name}: MPICH")
            starts["MPICH"] = bench.measure(["mpi"], {}, mpich=arguments.mpich)
    return {"scene": scene._asdict(), "calibration": table, "starts": starts, "load": os.getloadavg()[0]}


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


def size(text: str) -> int:
    """Read a power of two: 1K to 16M."""
    return int(text[:-1]) << {"K": 10, "M": 20}[text[-1]]


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[scene.name for scene in SCENES], help="scenes; repeatable")
    parser.add_argument("--sizes", type=size, nargs="+", metavar="SIZE", default=[1 << k for k in range(10, 25)],
                        help="as 1K or 16M (powers of two from 1K to 16M)")
    parser.add_argument("--seconds", type=float, default=0.5, help="for a size and contender (%(default)g)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)d)")
    parser.add_argument("--calibrate", type=float, default=30.0, help="seconds for hpcinfer calibrate (%(default)g)")
    parser.add_argument("--no-algorithms", dest="algorithms", action="store_false", help="only what Open MPI chooses")
    parser.add_argument("--mpich", type=Path, metavar="DIR", help="environment with MPICH")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them; needs matplotlib")
    arguments = parser.parse_args()
    if arguments.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib")
    machine = {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    scenes: list[dict[str, Any]] = []
    result = {"machine": machine, "seconds": arguments.seconds, "rounds": arguments.rounds, "scenes": scenes}
    for scene in SCENES:
        if not arguments.only or scene.name in arguments.only:
            scenes.append(run_scene(scene, arguments))
            if arguments.json:
                arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join([machine_line(result), *(line for found in scenes for line in markdown(found))]))
    if arguments.plot:
        plot(result, arguments.plot)


def processor() -> str:
    """Name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
