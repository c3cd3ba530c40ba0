"""`hpcinfer calibrate`: measure how ranks sum and exchange fastest here, and remember it for the jobs to come."""

import argparse
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hpcinfer.agree import on_all
from hpcinfer.comm.world import end_together, start_world
from hpcinfer.errors import EXIT_DONE, ConfigError
from hpcinfer.units import format_bytes

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import World
    from hpcinfer.comm.selector import Curves, Measured

HELP = "measure how the ranks of a tp group sum fastest here, and remember it for the jobs to come"
EXAMPLE = "mpirun -n 8 hpcinfer calibrate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("--time-limit", metavar="S", type=float, default=20.0,
                        help="seconds that it may take, about (default: %(default)g)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="where the arrays that are summed live: cuda, a GPU for each rank (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def command(args: argparse.Namespace) -> int:
    """Measure, write the table, print it."""
    if args.time_limit <= 0:
        raise ConfigError(f"--time-limit {args.time_limit:g}", expected="more than 0 seconds")
    world = start_world()
    if world.size == 1:
        raise ConfigError("one rank has nobody to sum with", expected="ranks as a job has them", hint=EXAMPLE)
    return end_together(world, lambda: _calibrate(world, args))


def _calibrate(world: "World", args: argparse.Namespace) -> int:
    from hpcinfer.comm.calibration import calibrate
    from hpcinfer.comm.form_table import machine_signature, write_table
    from hpcinfer.comm.topology import discover
    from hpcinfer.config import ModelOptions
    from hpcinfer.engine.placement import make_kernels

    world.locations = discover(world)
    kernels = on_all(world, lambda: make_kernels(ModelOptions(device=args.device), threads=1))
    table = calibrate(world, args.time_limit, kernels.device_arrays())
    if world.rank == 0:
        signature = machine_signature(world)
        try:
            path: str = str(write_table(signature, table))
        except OSError as error:
            path = ""
            print(f"the table cannot be kept: {error}; $HPCINFER_CACHE may name another folder", file=sys.stderr)
        text = json.dumps({"signature": signature, "path": path, "shapes": table}) if args.json else ""
        print(text or "\n".join([signature, *_lines(table), f"kept in {path}" if path else ""]), flush=True)
    world.barrier()
    return EXIT_DONE


def _lines(table: Mapping[str, "Measured"]) -> list[str]:
    """Tables for each shape: microseconds by operation, size and form, the best one of a size with a star."""
    lines = []
    for shape, operations in table.items():
        lines += ["", f"ranks on nodes: {shape}"]
        for operation, curves in operations.items():
            lines += _rows(operation, curves)
    return lines


def _rows(operation: str, curves: "Curves") -> list[str]:
    found: dict[int, dict[str, float]] = {}
    for name, points in curves.items():
        for point in points:
            found.setdefault(point.num_bytes, {})[name] = point.seconds
    rows = [" ".join([f"{format_bytes(size):>14}", *(_cell(row, name) for name in curves)])
            for size, row in sorted(found.items())]  # fmt: skip
    return [" ".join([f"{operation:>14}", *(f"{name:>15}" for name in curves)]), *rows]


def _cell(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        return f"{'':>15}"
    star = "*" if row[name] == min(row.values()) else " "
    return f"{row[name] * 1e6:>11.0f} us{star}"


if __name__ == "__main__":
    from hpcinfer.__main__ import main

    raise SystemExit(main(["calibrate", *sys.argv[1:]]))
