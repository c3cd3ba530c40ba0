"""`hpcinfer merge OUTPUT`: write the finished rows of a job, in input order. Needs neither MPI nor torch."""

import argparse
from pathlib import Path

from hpcinfer.errors import EXIT_DONE, EXIT_FAILED, ConfigError
from hpcinfer.units import format_bytes

HELP = "write the finished rows of a job in input order, while it runs or after"
EXAMPLE = "hpcinfer merge --partial completions.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="the --output of the job, or its job directory")
    parser.add_argument("--partial", action="store_true", help="the rows that are finished, into OUTPUT.partial")
    parser.add_argument("--to", metavar="FILE", type=Path, help="write into this new file instead")


def command(args: argparse.Namespace) -> int:
    """Merge."""
    from hpcinfer.comm.serial import SerialGroup
    from hpcinfer.recovery.layout import JobPaths
    from hpcinfer.recovery.merging import merge

    paths = JobPaths.of(args.output)
    paths.require()
    if args.to:
        _check_target(args.to)
    target = args.to or (Path(f"{paths.output}.partial") if args.partial else paths.output)
    report = merge(paths, target, SerialGroup(), partial=args.partial)
    print(f"{report.num_done} of {report.num_rows} rows, {report.num_failed} of them errors,"
          f" {format_bytes(report.size_bytes)}: {target}")
    return EXIT_FAILED if report.num_conflicts else EXIT_DONE


def _check_target(target: Path) -> None:
    if target.exists() or not target.parent.is_dir():
        found = f"--to {target} is there" if target.exists() else f"no directory {target.parent} for --to"
        raise ConfigError(found, expected="a new file in a directory that exists", hint="give another --to")
