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
from hpcinfer.comm.world import end_together, leave, open_line, start_world, survive
from hpcinfer.config import EngineOptions, JobOptions, MeshOptions, ModelOptions, SamplingParams
from hpcinfer.errors import EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE, ConfigError, RankFailedError
from hpcinfer.log import start_logging
from hpcinfer.partition.mesh import Mesh, resolve_mesh
from hpcinfer.report.metrics import Metrics
from hpcinfer.report.slow_ranks import pace_of
from hpcinfer.report.summary import summary_lines, write_report

if TYPE_CHECKING:
    from hpcinfer.comm.mpi import MpiGroup
    from hpcinfer.comm.protocol import Collectives, World
    from hpcinfer.data.prepare import Preparer
    from hpcinfer.data.sampling_defaults import SamplingDefaults
    from hpcinfer.data.tokenizer import Tokenizer
    from hpcinfer.engine.replica import Replica
    from hpcinfer.kernels.protocol import Kernels
    from hpcinfer.recovery.job import Job
    from hpcinfer.recovery.merging import MergeReport
    from hpcinfer.recovery.serve import Serving
    from hpcinfer.recovery.stopping import Stopped, Stopper
    from hpcinfer.recovery.watchdog import Watchdog
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
    from hpcinfer.recovery.stopping import Stopper

    with Stopper() as stopper:
        return leave(world, end_together(world, lambda: _watch(world, options, stopper)))


def _watch(world: "World", options: RunOptions, stopper: "Stopper") -> int:
    """Run with a watchdog on each rank. Collective over the world."""
    from hpcinfer.recovery.autopsy import exchange_roster
    from hpcinfer.recovery.layout import JobPaths
    from hpcinfer.recovery.watchdog import Watchdog

    check_world_size(world.size)
    launched = world.size
    world, roster = survive(world, exchange_roster)
    hangs = JobPaths(Path(options.job.output or "unnamed")).hangs
    with Watchdog(world, roster, hangs, options.job.hang_timeout) as watch:
        return _run(world, launched, options, stopper, watch)


def _run(world: "World", launched: int, options: RunOptions, stopper: "Stopper", watch: "Watchdog") -> int:
    from hpcinfer.recovery.member import Member
    from hpcinfer.recovery.stopping import Stopped

    phases, rank = Metrics(), world.rank
    watch.follow(phases)
    world, (mesh, setup, line) = survive(world, lambda group: _prepare(group, launched, options, phases, stopper))
    if setup.stopped is not None:
        return _end_early(world, options, setup.stopped)
    report = setup.complete
    if report is not None:
        log.info("the job is complete: %d rows, %d errors", report.num_rows, report.num_failed)
    else:
        serving = _serving(line or world, mesh, options, setup, stopper)
        member = Member(serving, line)
        watch.follow(serving.options.metrics)
        watch.measure(lambda: pace_of(rank, member.report()))
        with phases.phase("load"):
            loaded = [_load(world, line, serving)]
        with phases.phase("run"):
            rank_report = member.run(loaded.pop())  # whose memory is the member's alone
        facts = _RunFacts(mesh, setup, phases, rank_report)
        world, result = survive(world, lambda group: _finish(group, options, facts, stopper))
        if isinstance(result, Stopped):
            return _end_early(world, options, result)
        report = result
    assert report is not None
    if world.rank == 0:
        print(setup.job.paths.output, flush=True)
    failed = report.num_conflicts > 0 or (options.job.fail_on_error and report.num_failed > 0)
    return EXIT_FAILED if failed else EXIT_DONE


def _prepare(
    world: "World", launched: int, options: RunOptions, phases: Metrics, stopper: "Stopper"
) -> "tuple[Mesh, _Setup, MpiGroup | None]":
    """Check and find everything, for as many ranks as were launched, though some may have died since.

    Collective over the world; fails everywhere or nowhere.
    """
    from hpcinfer.recovery.stopping import agree_to_stop
    from hpcinfer.recovery.time_limit import agree_time_limit

    mesh = on_all(world, lambda: _check(launched, options))
    same_everywhere(world, options.flat(), "the options")
    stopper.time_limit = agree_time_limit(options.job, world)
    setup = _set_up(world, mesh, options, phases)
    stopped, complete = agree_to_stop(stopper, setup.job, world), _read_complete(world, setup.job)
    setup = dataclasses.replace(setup, stopped=stopped, complete=complete)
    return mesh, setup, open_line(world)


def _end_early(world: "Collectives", options: RunOptions, stopped: "Stopped") -> int:
    """Say what becomes of a job that was stopped. Collective over the world."""
    from hpcinfer.recovery.stopping import farewell

    line = on_root(world, lambda: farewell(stopped, requeue=options.job.requeue).encode()).decode()
    log.info("%s", line)
    return EXIT_RESUMABLE


def _read_complete(world: "Collectives", job: "Job") -> "MergeReport | None":
    """Report of the merge, if the job is complete: read by the root, so that all ranks take one way. Collective."""
    from hpcinfer.recovery.merging import MergeReport, read_complete

    def read() -> bytes:
        report = read_complete(job.paths)
        return json.dumps(report).encode() if report else b""

    data = on_root(world, read)
    return MergeReport(*json.loads(data)) if data else None


def _check(world_size: int, options: RunOptions) -> Mesh:
    """Check what needs no file."""
    from hpcinfer.engine.replica import check_engine_options
    from hpcinfer.recovery.job import check_job_options

    if not options.model.model:
        raise ConfigError("no --model", expected="a store or a Hugging Face folder", hint="hpcinfer run --help")
    check_job_options(options.job)
    check_engine_options(options.engine)
    sizes = options.mesh
    if not 0 <= sizes.spare_ranks < world_size:
        raise ConfigError(f"--spare-ranks {sizes.spare_ranks}", expected=f"from 0 to {world_size - 1}")
    return resolve_mesh(
        world_size - sizes.spare_ranks, sizes.tensor_parallel_size, sizes.pipeline_parallel_size,
        sizes.data_parallel_size,
    )  # fmt: skip


@dataclass(frozen=True)
class _Setup:
    """What is known before weights are loaded."""

    store: "Store"
    kernels: "Kernels"
    job: "Job"
    preparer: "Preparer"
    name: str  # of this MPI job, as no other one is called
    stopped: "Stopped | None" = None  # before anything was loaded
    complete: "MergeReport | None" = None  # of the last merge, if nothing is left to do


def _set_up(world: "Collectives", mesh: Mesh, options: RunOptions, phases: Metrics) -> _Setup:
    """Find the model and the input, open the job directory. Collective over the world; fails everywhere or nowhere."""
    from hpcinfer.data.chat import ChatTemplate
    from hpcinfer.data.prepare import Preparer
    from hpcinfer.data.versions import profile as data_profile
    from hpcinfer.engine.placement import make_kernels
    from hpcinfer.engine.replica import resolve_dtype
    from hpcinfer.recovery.job import find_input, open_job
    from hpcinfer.recovery.layout import JobPaths
    from hpcinfer.recovery.leases import incarnation_name
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
    name = on_root(world, lambda: incarnation_name().encode()).decode()
    return _Setup(store, kernels, job, preparer, name)


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


def _serving(
    mail: "Collectives", mesh: Mesh, options: RunOptions, setup: _Setup, stopper: "Stopper"
) -> "Serving":
    """Say what is served, on which ranks. Not collective."""
    from hpcinfer.engine.replica import ReplicaOptions, resolve_dtype
    from hpcinfer.partition.layout import ModelLimits, layout_of
    from hpcinfer.recovery.election import Election
    from hpcinfer.recovery.serve import Serving

    dtype, max_model_len = resolve_dtype(options.model.dtype), setup.preparer.max_model_len
    limits = ModelLimits(setup.store.config.num_layers, setup.store.grains)
    layout = layout_of(mesh, mail.size, limits)
    return Serving(
        job=setup.job,
        preparer=setup.preparer,
        store=setup.store,
        kernels=setup.kernels,
        options=ReplicaOptions(options.engine, dtype, max_model_len, options.job.seed, _cache_dtype(options)),
        model_name=f"hpcinfer-{setup.store.digest[:12]}",
        lease_timeout_s=options.job.lease_timeout,
        layout=layout,
        mail=mail,
        election=Election(setup.job.paths.claimants, setup.name, layout.replicas[0].members[0]),
        stopper=stopper,
    )


def _load(world: "World", line: "MpiGroup | None", serving: "Serving") -> "Replica | None":
    """Load the weights. Collective over the world; fails everywhere or nowhere.

    Returns:
        None on a spare rank; and where a rank of the replica has died meanwhile.
    """
    from hpcinfer.engine.replica import build_together

    replica: Replica | None = None

    def build() -> None:
        nonlocal replica
        replica = serving.build_first(world, line)

    try:
        build_together(world, build)
    except RankFailedError:
        world.revoke()  # nobody waits for this rank; who can serve does so, and the others regroup
    return replica


@dataclass(frozen=True)
class _RunFacts:
    """What the summary says of the whole run."""

    mesh: Mesh
    setup: _Setup
    phases: Metrics
    rank_report: dict[str, Any]


def _finish(
    world: "Collectives", options: RunOptions, facts: _RunFacts, stopper: "Stopper"
) -> "MergeReport | Stopped":
    """Merge and report, unless the job was stopped before its end. Collective over the world."""
    from hpcinfer.recovery.merging import CACHES_S, merge
    from hpcinfer.recovery.snapshots import remove_snapshots
    from hpcinfer.recovery.stopping import agree_to_stop

    paths = facts.setup.job.paths
    with facts.phases.phase("merge"):
        stopped = agree_to_stop(stopper, facts.setup.job, world)
        merged = None if stopped else merge(paths, paths.output, world, patience_s=CACHES_S)
    ranks = [json.loads(data) for data in world.all_gather_bytes(json.dumps(facts.rank_report).encode())]
    if merged is None:
        assert stopped is not None
        return stopped._replace(num_kept=sum(rank["rows"]["kept"] for rank in ranks))
    if world.rank == 0:
        remove_snapshots(paths)
        _report(world, options, facts, merged, ranks)
    return merged


def _report(
    world: "Collectives", options: RunOptions, facts: _RunFacts, merged: "MergeReport", ranks: list[dict[str, Any]]
) -> None:
    """Write the reports of all ranks beside the job, show the summary."""
    setup, defaults = facts.setup, facts.setup.preparer.defaults
    run = {
        "mesh": str(facts.mesh),
        "world_size": world.size,
        "input_kind": setup.job.kind,
        "num_rows": merged.num_rows,
        "num_failed": merged.num_failed,
        "kv_cache_bytes": facts.rank_report["kv_cache_bytes"],
        "num_blocks": facts.rank_report["num_blocks"],
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
