"""What fault tolerance costs when nothing fails: the same jobs with and without it, on the same transport, in turn.

    python benchmarks/tolerance.py --model MODEL --rounds 3
    python benchmarks/tolerance.py --meshes 1x1x2,2x1x1 --threads 1 --json tolerance.json

Each round runs every mesh under `mpiexec` (ob1, shared memory and TCP), under `mpiexec --with-ft ulfm` (the same), and
under `mpiexec` with the transport that it chooses by itself, which is what a site gives up for fault tolerance.
Seconds are those of the job's run, without loading and merging. Needs Open MPI 5.
"""

import argparse
import itertools
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import NamedTuple

from contenders import Mesh
from processes import run_program

DEMO_MODEL = Path(__file__).resolve().parents[1] / "examples" / "demo_model"
_SAME = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm,tcp"}
_ROOT = ("PRTE_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT")


class Way(NamedTuple):
    """A way to launch a job."""

    name: str
    flags: tuple[str, ...]
    environment: dict[str, str]


WAYS = (
    Way("without", (), _SAME),
    Way("with", ("--with-ft", "ulfm"), _SAME),
    Way("without, any transport", (), {}),
)


def main() -> None:
    """Measure, and print a table of ratios."""
    args = _read_arguments()
    with tempfile.TemporaryDirectory(prefix="tolerance-") as name:
        folder = Path(name)
        prompts = [{"prompt": f"Question {i}: " + "and then " * (i % 40), "max_tokens": 64} for i in range(args.rows)]
        (folder / "in.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in prompts))
        seconds: dict[str, dict[str, list[float]]] = {str(mesh): {} for mesh in args.meshes}
        for number, mesh, way in itertools.product(range(args.rounds), args.meshes, WAYS):
            took = _run(args, folder, mesh, way, number)
            seconds[str(mesh)].setdefault(way.name, []).append(took)
            print(f"{mesh}, {way.name}: {took:.2f} s", file=sys.stderr, flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": _machine(), "seconds": seconds}, indent=2) + "\n")
    _print_table(seconds)


def _read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="(default: the demo model)")
    parser.add_argument("--meshes", type=_read_meshes, default="2x1x1,1x1x2,1x2x1", metavar="DPxPPxTP,...")
    parser.add_argument("--threads", type=int, default=1, help="of a rank (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all seconds")
    return parser.parse_args()


def _read_meshes(text: str) -> list[Mesh]:
    return [Mesh(*map(int, mesh.split("x"))) for mesh in text.split(",")]


def _run(args: argparse.Namespace, folder: Path, mesh: Mesh, way: Way, number: int) -> float:
    """Run one job; returns the seconds of its run."""
    output = folder / f"{number}-{mesh}-{WAYS.index(way)}.jsonl"
    mpiexec = Path(sys.executable).with_name("mpiexec")
    launcher = [os.fspath(mpiexec if mpiexec.exists() else "mpiexec"), "--oversubscribe", "--bind-to", "none"]
    options = {
        "model": args.model, "input": folder / "in.jsonl", "output": output, "threads": args.threads,
        "data-parallel-size": mesh.dp, "pipeline-parallel-size": mesh.pp, "tensor-parallel-size": mesh.tp,
    }  # fmt: skip
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    environment = {"OMP_NUM_THREADS": str(args.threads), "OMPI_MCA_mpi_yield_when_idle": "1", **way.environment}
    if os.geteuid() == 0:
        environment |= {name + end: "1" for name in _ROOT for end in ("", "_CONFIRM")}
    argv = [*launcher, *way.flags, "-n", str(mesh.ranks), sys.executable, "-m", "hpcinfer.run", *flags, "--ignore-eos"]
    run_program(argv, environment, folder)
    (report,) = Path(f"{output}.job", "reports").iterdir()
    return float(json.loads(report.read_text())["run"]["seconds"]["run"])


def _print_table(seconds: dict[str, dict[str, list[float]]]) -> None:
    print(f"{_machine()}\n\n| mesh | {' | '.join(way.name for way in WAYS)} | with / without | any transport / same |")
    print("|---|" + "---|" * (len(WAYS) + 2))
    for mesh, ways in seconds.items():
        same, tolerant, fast = (ways[way.name] for way in WAYS)
        ratios = (median(a / b for a, b in zip(other, same, strict=True)) for other in (tolerant, fast))
        cells = [f"{median(each):.2f} s" for each in (same, tolerant, fast)] + [f"{ratio:.3f}" for ratio in ratios]
        print(f"| {mesh} | {' | '.join(cells)} |")


def _machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, {platform.platform()}"


if __name__ == "__main__":
    main()
