"""How long a job of several replicas loads on a file system of limited bandwidth, and when it has its first token.

    python benchmarks/loading.py                                     # 1, 2, 4, 8 replicas of a random Llama of 0.5 GB
    python benchmarks/loading.py --replicas 1,4 --shape tiny --mb-per-s 5

Three ways in turn: `together` is hpcinfer, `together, then begin` the same where nothing is computed before all weights
are there, `each alone` a loader in which every rank reads what it needs. Requests to the store wait as long as they
would on a file system of that bandwidth, whoever asks; the store is put out of the page cache before each job. Bytes
are those that the readers have asked for, and those that the system has fetched from storage (`read_bytes`, 0 where
the file system is in memory).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from loading_rank import LOADINGS
from random_model import SHAPES, write_random_model
from virtual_hosts import mpiexec

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.weights.conversion import convert

HERE = Path(__file__).resolve().parent
_ROWS, _TOKENS_IN, _TOKENS_OUT = 8, 200, 2  # of a job: rows, and tokens of each


class Place(NamedTuple):
    """What all jobs share."""

    store: Path
    prompts: Path
    clock: Path
    bytes_per_s: float


class Result(NamedTuple):
    """One job."""

    seconds: float  # until the last rank had its weights ready
    first_token_s: float
    asked: int  # bytes, of all ranks
    fetched: int


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", default="1,2,4,8", help="numbers of them (default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default="M1", help="of the random model (default: %(default)s)")
    parser.add_argument("--mb-per-s", type=float, default=60.0, help="of the file system (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="of all jobs (default: %(default)s)")
    parser.add_argument("--dir", type=Path, help="where model, store and jobs go for a while")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    numbers = [int(text) for text in args.replicas.split(",")]
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        place = prepare(Path(folder), args.shape, args.mb_per_s * 1e6)
        results: dict[tuple[str, int], list[Result]] = {(way, number): [] for way in LOADINGS for number in numbers}
        for turn in range(args.rounds):
            for way, number in results:
                results[way, number].append(run(place, way, number, Path(folder) / f"{way} {number} {turn}"))
        size = sum(file.stat().st_size for file in place.store.iterdir())
    print("\n".join(table(results, size, args.mb_per_s)))
    if args.json:
        rows = [{"way": way, "replicas": number, "jobs": [job._asdict() for job in jobs]}
                for (way, number), jobs in results.items()]  # fmt: skip
        args.json.write_text(json.dumps({"store": size, "mb_per_s": args.mb_per_s, "rows": rows}))


def prepare(folder: Path, shape: str, bytes_per_s: float) -> Place:
    """Make the model, its store and the prompts."""
    model = write_random_model(folder / "model", SHAPES[shape])
    convert(model, folder / "model.store", SerialGroup())
    rows = [{"prompt": list(range(2 + row, 2 + row + _TOKENS_IN)), "max_tokens": _TOKENS_OUT, "ignore_eos": True}
            for row in range(_ROWS)]  # fmt: skip
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Place(folder / "model.store", folder / "in.jsonl", folder / "clock", bytes_per_s)


def run(place: Place, way: str, replicas: int, folder: Path) -> Result:
    """Run one job."""
    folder.mkdir()
    place.clock.write_bytes(b"")
    forget(place.store)
    argv = [mpiexec(), "--oversubscribe", "--bind-to", "none", "-n", str(replicas), sys.executable,
            HERE / "loading_rank.py", way, str(place.bytes_per_s), place.clock, "--model", place.store, "--input",
            place.prompts, "--output", folder / "out.jsonl", "--kv-cache-memory", "64MiB", "--max-model-len", "256",
            "-dp", str(replicas)]  # fmt: skip
    done = subprocess.run([str(each) for each in argv], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    ranks = json.loads((folder / "out.jsonl.job" / "report.json").read_text())["ranks"]
    loading: list[dict[str, Any]] = [rank["loading"] for rank in ranks]
    firsts = [each["first_token_s"] for each in loading if each["first_token_s"]]
    return Result(max(each["last_layer_s"] for each in loading), min(firsts),
                  sum(each["bytes_read"] for each in loading), sum(each["read_bytes"] for each in loading))  # fmt: skip


def forget(store: Path) -> None:
    """Put the files of a store out of the page cache."""
    for path in store.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table(results: dict[tuple[str, int], list[Result]], size: int, mb_per_s: float) -> list[str]:
    """Write medians of the rounds as text."""
    lines = [
        f"store     {size / 1e6:.0f} MB; at {mb_per_s:g} MB/s the file system needs {size / 1e6 / mb_per_s:.1f} s",
        f"machine   {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}",
        "",
        f"{'loading':<22} replicas  load s  to fewest  first token s  asked / store  fetched / store",
    ]
    fewest = min(number for _, number in results)
    for (way, number), jobs in results.items():
        seconds = median(job.seconds for job in jobs)
        alone = median(job.seconds for job in results[way, fewest])
        lines.append(
            f"{way:<22} {number:>8} {seconds:>7.2f} {seconds / alone:>10.2f}"
            f" {median(job.first_token_s for job in jobs):>14.2f} {median(job.asked for job in jobs) / size:>14.2f}"
            f" {median(job.fetched for job in jobs) / size:>16.2f}"
        )
    return lines


if __name__ == "__main__":
    main()
