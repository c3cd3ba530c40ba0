"""`hpcinfer status OUTPUT`: how far a job is and who works on it. Needs neither MPI nor torch."""

import argparse
import json
from pathlib import Path

HELP = "show how far a job is: rows done and failed, rate, time left, who works on it"
EXAMPLE = "hpcinfer status completions.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="the --output of the job, or its job directory")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def command(args: argparse.Namespace) -> int:
    """Print the state of the job."""
    from hpcinfer.recovery.describe import describe_progress
    from hpcinfer.recovery.layout import JobPaths
    from hpcinfer.recovery.progress import progress

    numbers = progress(JobPaths.of(args.output))
    if args.json:
        values = numbers and {**numbers._asdict(), "workers": [worker._asdict() for worker in numbers.workers]}
        print(json.dumps(values, indent=2))
    else:
        print("\n".join(describe_progress(numbers)))
    return 0
