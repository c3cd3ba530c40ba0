"""`hpcinfer run`: the main job. Set-up fails on all ranks together; after that any error ends the whole job."""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hpcinfer.agree import on_all, on_root, where_am_i
from hpcinfer.cli import add_options, given_options, read_options
from hpcinfer.comm.imports import share_imports
from hpcinfer.comm.launcher import check_world_size, read_launch
from hpcinfer.comm.world import end_together, leave, start_world, survive
from hpcinfer.config import EngineOptions, JobMeshOptions, JobOptions, ModelOptions, RunOptions, SamplingParams
from hpcinfer.errors import EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE, RankFailedError
from hpcinfer.log import show_info, start_logging
from hpcinfer.report.recording import Recording, RecordingMetrics
from hpcinfer.report.run_phases import RunPhases
from hpcinfer.report.slow_ranks import pace_of
from hpcinfer.report.startup import STARTUP

if TYPE_CHECKING:
    from hpcinfer.comm.mpi import MpiGroup
    from hpcinfer.comm.protocol import Collectives, World
    from hpcinfer.engine.replica import Replica
    from hpcinfer.recovery.hangs.watchdog import Watchdog
    from hpcinfer.recovery.merging import MergeReport
    from hpcinfer.recovery.reporting import RunFacts
    from hpcinfer.recovery.serve import Serving
    from hpcinfer.recovery.stopping import Stopped, Stopper
    from hpcinfer.report.energy import EnergyMeter

HELP = "turn a file of prompts into a file of completions"
EXAMPLE = "mpirun -n 2 hpcinfer run --model examples/demo_model --input prompts.jsonl --output completions.jsonl"

log = logging.getLogger(__name__)

_MODULES = (  # that a rank imports, with all that these import, as a leader or when it becomes one
    "hpcinfer.recovery.failover.member", "hpcinfer.recovery.setup", "hpcinfer.recovery.hangs.watchdog",
    "hpcinfer.recovery.merging", "hpcinfer.recovery.reporting", "hpcinfer.comm.seating", "hpcinfer.report.energy",
    "hpcinfer.kernels.native.native", "hpcinfer.data.chat", "tokenizers", "h5py",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add_options(parser, ModelOptions, title="model")
    add_options(parser, JobOptions, title="job")
    add_options(parser, JobMeshOptions, title="mesh")
    add_options(parser, EngineOptions, title="engine (changes no result)")
    add_options(parser, SamplingParams, title="sampling (rows that say nothing else)", given_only=True)


def command(args: argparse.Namespace) -> int:
    """Run the job on all ranks that were launched."""
    options = RunOptions(
        model=read_options(args, ModelOptions),
        mesh=read_options(args, JobMeshOptions),
        engine=read_options(args, EngineOptions),
        job=read_options(args, JobOptions),
        sampling=given_options(args, SamplingParams),
    )
    world = start_world()
    STARTUP.mark("world")
    start_logging(is_root=world.rank == 0, who=where_am_i(world) if world.size > 1 else "")
    world = end_together(world, lambda: survive(world, lambda group: share_imports(group, _MODULES))[0])
    STARTUP.mark("modules")
    from hpcinfer.recovery.stopping import Stopper

    with Stopper() as stopper:
        return leave(world, end_together(world, lambda: _watch(world, options, stopper)))


def _watch(world: "World", options: RunOptions, stopper: "Stopper") -> int:
    """Run with a watchdog on each rank. Collective over the world."""
    from hpcinfer.recovery.hangs.autopsy import exchange_roster
    from hpcinfer.recovery.hangs.watchdog import Watchdog
    from hpcinfer.recovery.layout import JobPaths

    launched = world.size
    on_all(world, lambda: check_world_size(launched))
    world, roster = survive(world, exchange_roster)
    hangs = JobPaths(Path(options.job.output or "unnamed")).hangs
    with Watchdog(world, roster, hangs, options.job.hang_timeout) as watch:
        return _run(world, launched, options, stopper, watch)


def _run(world: "World", launched: int, options: RunOptions, stopper: "Stopper", watch: "Watchdog") -> int:
    from hpcinfer.comm.seating import seats
    from hpcinfer.recovery.failover.member import Member
    from hpcinfer.recovery.reporting import RunFacts
    from hpcinfer.recovery.setup import prepare, serving_of
    from hpcinfer.recovery.stopping import Stopped

    meter, rank = _open_meter(), world.rank
    phases = RunPhases(Recording(launched) if options.job.trace else None)
    watch.follow(phases)
    world, (mesh, setup, line) = survive(world, lambda group: prepare(group, launched, options, phases, stopper))
    STARTUP.mark("set up")
    if setup.stopped is not None:
        return _end_early(world, options, setup.stopped)
    report = setup.complete
    if report is not None:
        log.info("the job is complete: %d rows, %d errors", report.num_rows, report.num_failed)
    else:
        serving = serving_of(line or world, mesh, options, setup, stopper)
        if phases.recording is not None:
            serving = serving.measured_by(RecordingMetrics(phases.recording))
        member = Member(serving, line)
        watch.follow(serving.options.metrics)
        watch.measure(lambda: pace_of(rank, member.report()))
        watch.last_word = member.witness.hung
        with phases.phase("load"):
            loaded = [_load(world, line, serving)]
        STARTUP.mark("built")
        phases.begin()
        with phases.phase("run"):
            rank_report = member.run(loaded.pop())  # whose memory is the member's alone
        facts = RunFacts(options, mesh, setup, phases, rank_report, seats(serving.layout, setup.places), meter)
        world, result = survive(world, lambda group: _finish(group, options, facts, stopper))
        if isinstance(result, Stopped):
            return _end_early(world, options, result)
        report = result
    assert report is not None
    if world.rank == 0 and options.job.merge:
        print(setup.job.paths.output, flush=True)
    failed = report.num_conflicts > 0 or (options.job.fail_on_error and report.num_failed > 0)
    return EXIT_FAILED if failed else EXIT_DONE


def _open_meter() -> "EnergyMeter | None":
    """Measure the energy of the node, on its first rank."""
    if read_launch().local_rank not in (0, None):
        return None
    from hpcinfer.report.energy import open_meter

    return open_meter()


def _end_early(world: "World", options: RunOptions, stopped: "Stopped") -> int:
    """Say what becomes of a job that was stopped. Collective over the world."""
    from hpcinfer.recovery.stopping import say_farewell

    if world.rank == 0:
        show_info()
        say_farewell(stopped, requeue=options.job.requeue)
    survive(world, lambda group: group.barrier())
    return EXIT_RESUMABLE


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
        serving.loading.abandon()
        world.revoke()  # nobody waits for this rank; who can serve does so, and the others regroup
    except Exception:
        serving.loading.stop()
        raise
    return replica


def _finish(
    world: "Collectives", options: RunOptions, facts: "RunFacts", stopper: "Stopper"
) -> "MergeReport | Stopped":
    """Merge, unless the job was stopped before its end, and report. Collective over the world."""
    from hpcinfer.recovery.reporting import gather_reports, write_reports, write_traces
    from hpcinfer.recovery.snapshots import remove_snapshots
    from hpcinfer.recovery.stopping import agree_to_stop

    if world.rank == 0:
        show_info()
    with facts.phases.phase("merge"):
        stopped = agree_to_stop(stopper, facts.setup.job, world)
        merged = None if stopped else _merge(world, options)
    ranks = gather_reports(world, facts)
    if stopped is not None:
        stopped = stopped._replace(num_kept=sum(rank["rows"]["kept"] for rank in ranks))  # the root says it
    result = merged or stopped
    assert result is not None
    if world.rank == 0:
        if merged is not None:
            remove_snapshots(facts.setup.job.paths)
        write_reports(facts, result, ranks)
    if merged is not None:  # who stops has little time
        write_traces(world, facts, ranks)
    return result


def _merge(world: "Collectives", options: RunOptions) -> "MergeReport":
    """Merge, or only count what is to be merged. Collective over the world."""
    from hpcinfer.recovery.layout import JobPaths
    from hpcinfer.recovery.merging import CACHES_S, MergeReport, count, merge

    paths = JobPaths(Path(options.job.output))
    if options.job.merge:
        return merge(paths, paths.output, world, patience_s=CACHES_S)
    counted = on_root(world, lambda: json.dumps(count(paths)).encode())
    return MergeReport(*json.loads(counted))


if __name__ == "__main__":
    from hpcinfer.__main__ import main

    raise SystemExit(main(["run", *sys.argv[1:]]))
