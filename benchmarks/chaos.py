"""Hurt jobs at random moments, in every way that this machine allows, and see what comes out.

    python benchmarks/chaos.py --rounds 20
    python benchmarks/chaos.py --rounds 300 --minutes 40 --output chaos      # rounds.jsonl, report.md, report.json
    python benchmarks/chaos.py --kinds rank --seed 17 --rounds 1             # a round once more
    python benchmarks/chaos.py --from chaos/rounds.jsonl                     # only the tables

Each round is a small job on a random mesh. It is disturbed, and started again where that is its design, until the
output is there, which must be that of the undisturbed job. Ends with 1 if anything was wrong; interrupted, it reports
what it has.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chaos_here import Here, prepare
from chaos_kinds import KINDS, Kind
from chaos_report import markdown, summary
from chaos_round import play

DEMO_MODEL = Path(__file__).resolve().parents[1] / "examples" / "demo_model"


def main() -> None:
    """Play the rounds, write the tables."""
    args = _read_arguments()
    args.output.mkdir(exist_ok=True, parents=True)
    rounds = [json.loads(line) for path in args.from_ for line in path.read_text().splitlines()]
    skipped: dict[str, str] = {}
    if not args.from_:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            _play_all(args, rounds, skipped)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
    result = summary(rounds, skipped)
    (args.output / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    (args.output / "report.md").write_text(markdown(result))
    print(markdown(result), end="")
    sys.exit(not result["is_right"])


def _read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=int, default=20, help="(default: %(default)s)")
    add("--minutes", type=float, default=float("inf"), help="begin no round later")
    add("--seed", type=int, default=0, help="of the first round; the next ones have the numbers behind it")
    add("--kinds", default=",".join(KINDS), help="of faults, with commas between them (default: %(default)s)")
    add("--rows", type=int, default=400, help="of a job (default: %(default)s)")
    add("--model", type=Path, default=DEMO_MODEL, help="store or Hugging Face folder (default: the demo model)")
    add("--output", type=Path, default=Path("chaos"), metavar="DIR", help="for results (default: %(default)s)")
    add("--dir", type=Path, help="where jobs write (a new temporary directory inside)")
    add("--from", type=Path, nargs="+", default=[], dest="from_", metavar="FILE", help="earlier rounds, to report only")
    args = parser.parse_args()
    args.kinds = args.kinds.split(",")
    if unknown := set(args.kinds) - set(KINDS):
        parser.error(f"unknown kinds {sorted(unknown)}, expected some of {', '.join(KINDS)}")
    return args


def _play_all(args: argparse.Namespace, rounds: list[dict[str, Any]], skipped: dict[str, str]) -> None:
    """Play until all rounds are done, or time is up; what is done is in `rounds` and in a file at any time."""
    end = time.monotonic() + 60 * args.minutes
    with (
        tempfile.TemporaryDirectory(prefix="chaos-", dir=args.dir) as name,
        prepare(args.model, args.rows, args.kinds, Path(name)) as here,
        (args.output / "rounds.jsonl").open("a") as file,
    ):
        skipped.update(here.skipped)
        for kind_name, reason in skipped.items():
            _say(f"left out: {kind_name}: {reason}")
        for seed, kind in zip(range(args.seed, args.seed + args.rounds), _deal(here, args.seed), strict=False):
            if time.monotonic() > end:
                _say("time is up")
                return
            rounds.append(play(kind, seed, here.workload, here.places, args.output))
            file.write(json.dumps(rounds[-1]) + "\n")
            file.flush()
            _say(f"{len(rounds)}/{args.rounds} {_line(rounds[-1])}")


def _deal(here: Here, seed: int) -> Iterator[Kind]:
    """Deal each kind of fault once, then as often as its weight says among all, in random order."""
    deck = [kind for kind in here.kinds for _ in range(kind.weight)]
    rng = random.Random(seed)
    yield from rng.sample(here.kinds, len(here.kinds))
    while deck:
        yield from rng.sample(deck, len(deck))


def _line(played: dict[str, Any]) -> str:
    faults = "; ".join(f"{fault['what']} ({fault['moment']})" for fault in played["faults"]) or "ended before its fault"
    starts = ", ".join(f"{one['mesh']} {one['seconds']:.1f} s -> {one['exit_code']}" for one in played["starts"])
    verdict = "ok" if played["is_right"] else f"WRONG {played['problems']}"
    return f"seed {played['seed']} {played['kind']}: {faults}: {starts}: {verdict}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
