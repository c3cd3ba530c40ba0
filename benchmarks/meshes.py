"""Every mesh of some virtual hosts, with flat collectives, with those that know the nodes, and with overlap, in turn.

    python benchmarks/meshes.py --random M1 --link 20 10000 --rounds 3 --json meshes.json
    python benchmarks/meshes.py --random M3 --quantize int8 --link 100 1000

The hosts are namespaces of this machine (launch/virtual_cluster.sh, which needs their permission): 4 hosts with 2 ranks
share its cores, so that rates say little about real nodes, and their ratios what the messages cost. All outputs must be
the same bytes.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import NamedTuple

from contenders import Mesh
from random_model import SHAPES, write_random_model
from virtual_hosts import Cluster, environment, mpiexec_on_hosts
from workload import Recipe, make_workload, write_workload

from hpcinfer.data.tokenizer import Tokenizer
from hpcinfer.report.rates import rates_of
from hpcinfer.weights.reader import Store

WAYS = {  # options of hpcinfer run
    "flat": ["--collectives", "one_shot", "--overlap-sums", "never"],
    "chosen": ["--overlap-sums", "never"],
    "overlapped": [],
}
_LIMIT_S = 600.0  # of a job


class Place(NamedTuple):
    """Where jobs run, with what."""

    folder: Path
    cluster: Cluster
    store: Path
    prompts: Path
    arguments: argparse.Namespace

    @property
    def num_ranks(self) -> int:
        """Ranks on all hosts."""
        return int(self.arguments.hosts * self.arguments.ranks_per_host)


class Result(NamedTuple):
    """What a job said."""

    tokens_per_s: float  # output tokens
    digest: str


def meshes_of(num_ranks: int, num_layers: int, grains: int) -> Iterator[Mesh]:
    """All meshes of so many ranks that the model allows."""
    for tp in range(1, min(num_ranks, grains) + 1):
        for pp in range(1, min(num_ranks, num_layers) + 1):
            if num_ranks % (tp * pp) == 0:
                yield Mesh(num_ranks // (tp * pp), pp, tp)


def calibrate(place: Place) -> None:
    """Measure all ways of the collectives on all hosts, for the jobs that follow."""
    argv = [*_mpiexec(place, place.num_ranks), sys.executable, "-m", "hpcinfer", "calibrate", "--time-limit", "30"]
    subprocess.run(argv, cwd=place.folder, env=_variables(place), check=True, stdout=subprocess.DEVNULL,
                   timeout=_LIMIT_S)  # fmt: skip


def _mpiexec(place: Place, num_ranks: int) -> list[str]:
    hosts = ",".join(f"vh{i}:{place.arguments.ranks_per_host}" for i in range(place.cluster.num_hosts))
    return [*mpiexec_on_hosts(), "--host", hosts, "--bind-to", "none", "-n", str(num_ranks)]


def _variables(place: Place) -> dict[str, str]:
    return {**os.environ, **environment(), **place.cluster.environment, "HPCINFER_CACHE": os.fspath(place.folder)}


def run_job(place: Place, mesh: Mesh, options: list[str]) -> Result:
    """Run one job on the hosts.

    Raises:
        SystemExit: it failed; with what it wrote.
    """
    output = place.folder / "out.jsonl"
    argv = [
        *_mpiexec(place, mesh.ranks), sys.executable, "-m", "hpcinfer.run", "-dp", str(mesh.dp), "-pp", str(mesh.pp),
        "-tp", str(mesh.tp), *options,
        "--model", os.fspath(place.store), "--input", os.fspath(place.prompts), "--output", os.fspath(output),
        "--temperature", "0", "--max-tokens", str(place.arguments.output_tokens), "--ignore-eos",
    ]  # fmt: skip
    run = subprocess.run(argv, cwd=place.folder, env=_variables(place), capture_output=True, text=True,
                         timeout=_LIMIT_S)  # fmt: skip
    if run.returncode != 0:
        raise SystemExit(f"{' '.join(argv)}\nended with {run.returncode}:\n{run.stderr}")
    (report_path,) = Path(f"{output}.job", "reports").glob("*.json")
    report = json.loads(report_path.read_text())
    rate = rates_of(report["run"], report["ranks"]).output
    result = Result(rate, hashlib.sha256(output.read_bytes()).hexdigest())
    subprocess.run(["rm", "-r", os.fspath(output), f"{output}.job"], check=True)
    return result


def measure(place: Place, meshes: list[Mesh]) -> dict[Mesh, dict[str, list[Result]]]:
    """Run all jobs, round after round."""
    found: dict[Mesh, dict[str, list[Result]]] = {mesh: {name: [] for name in WAYS} for mesh in meshes}
    for number in range(place.arguments.rounds):
        for mesh, results in found.items():
            for name, options in WAYS.items():
                results[name].append(run_job(place, mesh, options))
                rate = results[name][-1].tokens_per_s
                print(f"round {number + 1}, {mesh}, {name}: {rate:.1f} output tokens/s", file=sys.stderr)
    return found


def table(found: dict[Mesh, dict[str, list[Result]]]) -> str:
    """The results in Markdown: medians of output tokens/s, and of each round's ratio."""
    lines = ["| dp×pp×tp | flat | chosen | to flat | overlapped | to chosen |", "|---|---|---|---|---|---|"]
    for mesh, results in found.items():
        rates = {name: [each.tokens_per_s for each in results[name]] for name in WAYS}
        flat, chosen, overlapped = (f"{median(each):.1f}" for each in rates.values())
        to_flat = f"{_ratio(rates['chosen'], rates['flat']):.2f}"
        to_chosen = f"{_ratio(rates['overlapped'], rates['chosen']):.2f}"
        cells = [str(mesh).replace("x", "×"), flat, chosen, to_flat, overlapped, to_chosen]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return median(our / their for our, their in zip(ours, theirs, strict=True))


def prepare(folder: Path, arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Make the store and the prompts."""
    store = folder / "model.store"
    model = write_random_model(folder / "model", SHAPES[arguments.random])
    quantize = ["--quantize", arguments.quantize] if arguments.quantize else []
    argv = [sys.executable, "-m", "hpcinfer.convert", *quantize, os.fspath(model), os.fspath(store)]
    subprocess.run(argv, cwd=folder, check=True)
    recipe = Recipe(arguments.prompts, (32, 128), arguments.output_tokens)
    with Store.open(store) as opened:
        tokenizer = Tokenizer(opened.tokenizer_files)
    return store, write_workload(make_workload(tokenizer, recipe), folder)[0]


def main() -> int:
    """Measure and print; 1 if two jobs gave other bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", choices=sorted(SHAPES), default="M1", help="shape of the model (%(default)s)")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="precision of its weights, float32 if not given")
    parser.add_argument("--hosts", type=int, default=4, metavar="N", help="virtual hosts (%(default)s)")
    parser.add_argument("--ranks-per-host", type=int, default=2, metavar="N", help="(%(default)s)")
    parser.add_argument("--link", type=int, nargs=2, default=(20, 10000), metavar=("MICROSECONDS", "MBIT_PER_S"))
    parser.add_argument("--prompts", type=int, default=32, metavar="N", help="(%(default)s)")
    parser.add_argument("--output-tokens", type=int, default=16, metavar="N", help="of each prompt (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(%(default)s)")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="for models and outputs; a temporary one if not given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        folder = Path(name)
        store, prompts = prepare(folder, arguments)
        with closing(Cluster(arguments.hosts, folder / "cluster", arguments.link)) as cluster:
            place = Place(folder, cluster, store, prompts, arguments)
            with Store.open(store) as opened:
                meshes = list(meshes_of(place.num_ranks, opened.config.num_layers, opened.grains))
            calibrate(place)
            found = measure(place, meshes)
    delay, mbit = arguments.link
    where = f"{arguments.hosts} hosts with {arguments.ranks_per_host} ranks, {delay} us, {mbit} Mbit/s"
    machine = platform.processor() or platform.machine()
    print(f"{where}; {os.cpu_count()} cores ({machine}), load {os.getloadavg()[0]:.1f}")
    print(table(found))
    if arguments.json:
        data = {str(mesh): {name: [each._asdict() for each in some] for name, some in results.items()}
                for mesh, results in found.items()}  # fmt: skip
        arguments.json.write_text(json.dumps({"arguments": vars(arguments), "meshes": data}, indent=1, default=str))
    digests = {each.digest for results in found.values() for some in results.values() for each in some}
    print(f"{len(digests)} different outputs")
    return int(len(digests) > 1)


if __name__ == "__main__":
    sys.exit(main())
