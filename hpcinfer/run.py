"""`hpcinfer run`: the main job. Set-up fails on all ranks together; after that any error ends the whole job."""

import argparse
import dataclasses
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcinfer.agree import on_all, on_root, same_everywhere, where_am_i
from hpcinfer.cli import add_options, given_options, read_options
from hpcinfer.comm.launcher import check_world_size
from hpcinfer.comm.world import end_together, start_world
from hpcinfer.config import EngineOptions, JobOptions, MeshOptions, ModelOptions, SamplingParams
from hpcinfer.errors import EXIT_DONE, EXIT_FAILED, ConfigError
from hpcinfer.log import start_logging
from hpcinfer.partition.mesh import Mesh, resolve_mesh
from hpcinfer.report.metrics import Metrics
from hpcinfer.report.summary import summary_lines, write_report

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives
    from hpcinfer.data.prepare import Preparer
    from hpcinfer.data.sampling_defaults import SamplingDefaults
    from hpcinfer.data.tokenizer import Tokenizer
    from hpcinfer.engine.replica import Replica
    from hpcinfer.kernels.protocol import Kernels
    from hpcinfer.recovery.job import Job
    from hpcinfer.recovery.merging import MergeReport
    from hpcinfer.weights.locate import Located
    from hpcinfer.weights.reader import Store

HELP = "turn a file of prompts into a file of completions"
EXAMPLE = "mpirun -n 2 hpcinfer run --model examples/demo_model --input prompts.jsonl --output completions.jsonl"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """All options of a run."""

    model: ModelOptions
    mesh: MeshOptions
    engine: EngineOptions
    job: JobOptions
    sampling: dict[str, Any]  # what the command line says, by field of SamplingParams

    def flat(self) -> dict[str, Any]:
        """All options by name."""
        return {name: value for section in dataclasses.asdict(self).values() for name, value in section.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add_options(parser, ModelOptions, title="model")
    add_options(parser, JobOptions, title="job")
    add_options(parser, MeshOptions, title="mesh")
    add_options(parser, EngineOptions, title="engine (changes no result)")
    add_options(parser, SamplingParams, title="sampling (rows that say nothing else)", given_only=True)


def command(args: argparse.Namespace) -> int:
    """Run the job on all ranks that were launched."""
    options = RunOptions(
        model=read_options(args, ModelOptions),
        mesh=read_options(args, MeshOptions),
        engine=read_options(args, EngineOptions),
        job=read_options(args, JobOptions),
        sampling=given_options(args, SamplingParams),
    )
    world = start_world()
    start_logging(is_root=world.rank == 0, who=where_am_i(world) if world.size > 1 else "")
    return end_together(world, lambda: _run(world, options))


def _run(world: "Collectives", options: RunOptions) -> int:
    phases = Metrics()
    mesh = on_all(world, lambda: _check(world, options))
    same_everywhere(world, options.flat(), "the options")
    setup = _set_up(world, mesh, options, phases)
    from hpcinfer.recovery.merging import merge

    paths = setup.job.paths
    report = _read_complete(world, setup.job)
    if report is not None:
        log.info("the job is complete: %d rows, %d errors", report.num_rows, report.num_failed)
    else:
        with phases.phase("load"):
            replica = _load(world, mesh, options, setup)
        with phases.phase("run"):
            rank_report = _serve(world, mesh, options, setup, replica)
        with phases.phase("merge"):
            report = merge(paths, paths.output, world)
        _report(world, options, setup, _RunFacts(mesh, replica, phases, report), rank_report)
    if world.rank == 0:
        print(paths.output, flush=True)
    failed = report.num_conflicts > 0 or (options.job.fail_on_error and report.num_failed > 0)
    return EXIT_FAILED if failed else EXIT_DONE


def _read_complete(world: "Collectives", job: "Job") -> "MergeReport | None":
    """Report of the merge, if the job is complete: read by the root, so that all ranks take one way. Collective."""
    from hpcinfer.recovery.merging import MergeReport, read_complete

    def read() -> bytes:
        report = read_complete(job.paths)
        return json.dumps(report).encode() if report else b""

    data = on_root(world, read)
    return MergeReport(*json.loads(data)) if data else None


def _check(world: "Collectives", options: RunOptions) -> Mesh:
    """Check what needs no file."""
    from hpcinfer.engine.replica import check_engine_options
    from hpcinfer.recovery.job import check_job_options

    check_world_size(world.size)
    if not options.model.model:
        raise ConfigError("no --model", expected="a store or a Hugging Face folder", hint="hpcinfer run --help")
    check_job_options(options.job)
    check_engine_options(options.engine)
    sizes = options.mesh
    return resolve_mesh(
        world.size, sizes.tensor_parallel_size, sizes.pipeline_parallel_size, sizes.data_parallel_size
    )


@dataclass(frozen=True)
class _Setup:
    """What is known before weights are loaded."""

    store: "Store"
    kernels: "Kernels"
    job: "Job"
    preparer: "Preparer"


def _set_up(world: "Collectives", mesh: Mesh, options: RunOptions, phases: Metrics) -> _Setup:
    """Find the model and the input, open the job directory. Collective over the world; fails everywhere or nowhere."""
    from hpcinfer.data.chat import ChatTemplate
    from hpcinfer.data.prepare import Preparer
    from hpcinfer.data.versions import profile as data_profile
    from hpcinfer.engine.placement import make_kernels
    from hpcinfer.engine.replica import resolve_dtype
    from hpcinfer.recovery.job import find_input, open_job
    from hpcinfer.recovery.layout import JobPaths
    from hpcinfer.weights.locate import ensure_store, locate_model
    from hpcinfer.weights.reader import Store

    with phases.phase("input"):
        source = find_input(options.job, world)
    with phases.phase("model"):
        fallback = JobPaths(Path(options.job.output)).root / "store"
        located = locate_model(options.model.model, options.model.cache_dir, world, fallback)
        checked = on_all(world, lambda: _check_model(located, mesh, options))
        kernels = on_all(world, lambda: make_kernels(options.model, options.engine.threads))
        store_path = ensure_store(located, world)
        store = on_all(world, lambda: Store.open(store_path))
    dtypes = {"dtype": resolve_dtype(options.model.dtype), "kv_cache": _cache_dtype(options)}
    profile = {**kernels.profile(), **data_profile(), **dtypes}
    same_everywhere(world, profile, "the numerics profiles")
    manifest = {
        "model": {"digest": store.digest, "max_model_len": checked.max_model_len},
        "sampling": dataclasses.asdict(checked.defaults.values),
        "numerics": profile,
        "informative": {"model": options.model.model, "origins": checked.defaults.origins},
    }
    with phases.phase("index"):
        job = open_job(options.job, source, manifest, world)
    tokenizer = checked.tokenizer
    template = ChatTemplate(tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, job.template_date)
    preparer = Preparer(
        tokenizer, template, checked.defaults, checked.max_model_len, store.config.vocab_size, job.kind
    )
    return _Setup(store, kernels, job, preparer)


def _cache_dtype(options: RunOptions) -> str:
    from hpcinfer.engine.replica import resolve_cache_dtype

    return resolve_cache_dtype(options.model.kv_cache_dtype, options.model.dtype)


@dataclass(frozen=True)
class _CheckedModel:
    """What the options come to with this model."""

    max_model_len: int
    tokenizer: "Tokenizer"
    defaults: "SamplingDefaults"


def _check_model(located: "Located", mesh: Mesh, options: RunOptions) -> _CheckedModel:
    """Check all options against the model, before anything is converted."""
    from hpcinfer.data.prepare import check_defaults
    from hpcinfer.data.sampling_defaults import read_generation_config, resolve_defaults
    from hpcinfer.data.tokenizer import Tokenizer
    from hpcinfer.engine.replica import resolve_max_model_len
    from hpcinfer.model.shard import shard_plan
    from hpcinfer.weights.locate import preview

    model = preview(located)
    shard_plan(model.config, model.grains, mesh, mesh.coord(0))
    defaults = resolve_defaults(options.sampling, read_generation_config(model.tokenizer_files))
    check_defaults(defaults, model.config.vocab_size)
    max_model_len = resolve_max_model_len(model.config, options.model.max_model_len)
    return _CheckedModel(max_model_len, Tokenizer(model.tokenizer_files), defaults)


def _load(world: "Collectives", mesh: Mesh, options: RunOptions, setup: _Setup) -> "Replica":
    """Load the weights. Collective over the world; fails everywhere or nowhere."""
    from hpcinfer.engine.replica import ReplicaOptions, build_replica, resolve_dtype

    dtype, max_model_len = resolve_dtype(options.model.dtype), setup.preparer.max_model_len
    wanted = ReplicaOptions(options.engine, dtype, max_model_len, options.job.seed, _cache_dtype(options))
    replica = build_replica(world, mesh, setup.store, setup.kernels, wanted)
    setup.store.close()
    return replica


def _serve(
    world: "Collectives", mesh: Mesh, options: RunOptions, setup: _Setup, replica: "Replica"
) -> dict[str, Any]:
    """Run the loop until the job is complete; an error on any rank ends all. Collective over the world.

    Returns:
        The report of this rank.
    """
    from hpcinfer.recovery.serve import Serving, serve_follower, serve_leader

    if replica.is_leader:
        name = f"hpcinfer-{setup.store.digest[:12]}"
        serving = Serving(setup.job, setup.preparer, replica, name, options.job.lease_timeout)
        report = serve_leader(world, serving, mesh.dp)
    else:
        report = serve_follower(replica)
    world.barrier()
    return report


@dataclass(frozen=True)
class _RunFacts:
    """What the summary says of the whole run."""

    mesh: Mesh
    replica: "Replica"
    phases: Metrics
    merged: "MergeReport"


def _report(
    world: "Collectives", options: RunOptions, setup: _Setup, facts: _RunFacts, rank_report: dict[str, Any]
) -> None:
    """Collect the reports of all ranks on the root, write them beside the job, show the summary. Collective."""
    ranks = [json.loads(data) for data in world.all_gather_bytes(json.dumps(rank_report).encode())]
    if world.rank != 0:
        return
    defaults = setup.preparer.defaults
    run = {
        "mesh": str(facts.mesh),
        "world_size": world.size,
        "input_kind": setup.job.kind,
        "num_rows": facts.merged.num_rows,
        "num_failed": facts.merged.num_failed,
        "kv_cache_bytes": facts.replica.kv_cache_bytes,
        "num_blocks": facts.replica.num_blocks,
        "seconds": dict(facts.phases.seconds),
        "sampling": dataclasses.asdict(defaults.values),
        "origins": defaults.origins,
        "options": dataclasses.asdict(options.engine),
    }
    write_report(setup.job.paths.root, {"run": run, "ranks": ranks})
    for line in summary_lines(run, ranks):
        log.info("%s", line)


if __name__ == "__main__":
    from hpcinfer.__main__ import main

    raise SystemExit(main(["run", *sys.argv[1:]]))
