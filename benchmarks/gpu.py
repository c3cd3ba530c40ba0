"""hpcinfer on one GPU: right first, then as fractions of what the GPU can do, with transformers beside it.

    python benchmarks/gpu.py --json gpu.json --plot gpu.svg
    python benchmarks/gpu.py --parts rooflines,decode --precisions bf16 --rounds 5
    TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny                 # all parts as toys, on a CPU: for tests

Each part is a process of its own with a limited time; what it has measured is written when it ends, however it ends.
Ends with 1 if an output is wrong or a part breaks, with 2 where there is no GPU. Targets are printed, hit or missed.
"""

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

PARTS = {  # seconds of each, unless --minutes says otherwise
    "correctness": 70, "rooflines": 25, "decode": 160, "gaps": 30, "prefill": 55, "bulk": 155, "loading": 45,
}  # fmt: skip
PRECISIONS = ("bf16", "int8", "int4", "fp8")
_MINUTES = sum(PARTS.values()) / 60
_GRACE_S = 30.0  # for what a part has begun when its time is over; then it is stopped
_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_MACHINE = "machine"


class Task(NamedTuple):
    """What a part's process is told."""

    name: str
    args: argparse.Namespace
    folder: Path
    seconds: float

    @property
    def rows(self) -> Path:
        """File of its rows, one JSON object each."""
        return self.folder / "rows.jsonl"


def main() -> None:
    """Run all parts, write and print."""
    args = _read_arguments()
    if not _may_have_gpu():
        sys.exit(_refuse("no GPU here: " + ", ".join(_DEVICES) + " do not exist"))
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # nothing here starts CUDA: parts are forked
    importlib.import_module("torch")  # once for all of them
    machine = _run_part(_MACHINE, args, _GRACE_S)["rows"]
    if not machine or "failed" in machine[0]:
        sys.exit(_refuse(machine[0]["failed"] if machine else "the GPU cannot be used"))
    result: dict[str, Any] = {"machine": machine[0], "rounds": args.rounds, "tiny": args.tiny, "parts": {}}
    for name in args.parts:
        result["parts"][name] = _run_part(name, args, PARTS[name] * args.minutes / _MINUTES)
        _finish(result, args)
    from gpu_tables import lines

    print("\n".join(lines(result)))
    if args.plot:
        _draw(result, args.plot)
    sys.exit(not result["is_right"])


def _read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", type=_names(PARTS), default=list(PARTS), help=f"some of {','.join(PARTS)} (default: all)")
    add("--precisions", type=_names(PRECISIONS), default=list(PRECISIONS),
        help=f"of weights, the first for all measurements: some of {','.join(PRECISIONS)} (default: all)")  # fmt: skip
    add("--rounds", type=int, default=2, help="after a warm-up (default: %(default)s)")
    add("--minutes", type=float, default=_MINUTES, help="for all parts together, about (default: %(default)s)")
    add("--store", type=Path, help="for the part loading, instead of a random one of 2 GB")
    add("--dir", type=Path, help="where to write (a new temporary directory inside)")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured, after each part")
    add("--plot", type=Path, metavar="FILE", help="draw it, as .svg or .png; needs matplotlib")
    add("--tiny", action="store_true", help="toys, which also Triton's interpreter can run")
    return parser.parse_args()


def _names(known: Sequence[str] | dict[str, int]) -> Any:
    def names(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {', '.join(known)}")
        return found

    return names


def _may_have_gpu() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" or any(map(os.path.exists, _DEVICES))


def _refuse(reason: str) -> int:
    print(f"{reason}; TRITON_INTERPRET=1 with --tiny runs toys on a CPU", file=sys.stderr)
    return 2


def _run_part(name: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own; its rows, and how it ended if not as it should."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=args.dir) as folder:
        task = Task(name, args, Path(folder), seconds)
        process = multiprocessing.get_context("fork").Process(target=_measure, args=(task,))
        process.start()
        process.join(seconds + _GRACE_S)
        ended = f"ended with {process.exitcode}" if process.exitcode else ""
        if process.is_alive():
            process.kill()
            process.join()
            ended = f"stopped after {seconds + _GRACE_S:.0f} s"
        lines = task.rows.read_text().splitlines() if task.rows.exists() else []
    return {"seconds": time.monotonic() - begin, "ended": ended, "rows": [json.loads(line) for line in lines]}


def _measure(task: Task) -> None:
    """Measure one part, in its process; every row is in the file once it is there."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    with task.rows.open("w", buffering=1) as file:
        try:
            for row in _part(task):
                file.write(json.dumps(row) + "\n")
                print(f"{task.name}: {json.dumps(row)[:200]}", file=sys.stderr, flush=True)
        except Exception as error:
            traceback.print_exc()
            file.write(json.dumps({"failed": f"{type(error).__name__}: {error}"}) + "\n")


def _part(task: Task) -> Any:
    from gpu_bench import Bench
    from gpu_sizes import FULL, TOY

    from hpcinfer.kernels.gpu.device import own_device

    args, sizes, end = task.args, TOY if task.args.tiny else FULL, time.monotonic() + task.seconds
    bench = Bench(own_device(0, 1), sizes, tuple(args.precisions), args.rounds, task.folder, end, args.store)
    return importlib.import_module(f"gpu_{task.name}").run(bench)


def _draw(result: dict[str, Any], path: Path) -> None:
    if not importlib.util.find_spec("matplotlib"):
        print("no plot: matplotlib is not installed")
        return
    from gpu_plot import draw

    draw(result, path)


def _finish(result: dict[str, Any], args: argparse.Namespace) -> None:
    """Add what the rows come to, and write it all."""
    from gpu_results import is_right, targets
    from gpu_sizes import FULL, TOY

    shape = next(iter((TOY if args.tiny else FULL).shapes))
    result["targets"] = [each._asdict() for each in targets(result["parts"], shape)]
    result["is_right"] = is_right(result["parts"])
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
