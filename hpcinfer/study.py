"""`hpcinfer study`: how throughput grows with nodes and ranks, and what is lost. Needs neither MPI nor torch itself."""

import argparse
import importlib.util
import logging
import os
import shlex
import sys
from typing import TYPE_CHECKING

from hpcinfer.cli import add_options, given_options, read_options
from hpcinfer.config import EngineOptions, ModelOptions, SamplingParams
from hpcinfer.errors import EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE
from hpcinfer.log import start_logging
from hpcinfer.scaling.options import StudyOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hpcinfer.scaling.plan import Shape
    from hpcinfer.scaling.results import Result
    from hpcinfer.scaling.site import Site
    from hpcinfer.scaling.study import Study
    from hpcinfer.supervision.launchers import Command

HELP = "measure strong and weak scaling: runs or batch jobs, a table, CSV, plots and a fitted curve"
EXAMPLE = "hpcinfer study --model examples/demo_model --input prompts.jsonl --ranks-per-node 1,2 --output scaling"

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command, and those of `hpcinfer run` that all points share."""
    add_options(parser, StudyOptions, title="study")
    add_options(parser, ModelOptions, title="model")
    add_options(parser, EngineOptions, title="engine (changes no result)")
    add_options(parser, SamplingParams, title="sampling (rows that say nothing else)", given_only=True)


def command(args: argparse.Namespace) -> int:
    """Plan, then run or submit what is missing, then collect."""
    from hpcinfer.scaling.asking import ask, only_shape
    from hpcinfer.scaling.plan import parse_shape
    from hpcinfer.scaling.running import Runner
    from hpcinfer.scaling.site import find_site
    from hpcinfer.scaling.submitting import submit

    start_logging(is_root=True, who="study")
    options, model = read_options(args, StudyOptions), read_options(args, ModelOptions)
    site = find_site(options.launcher, options.hosts, os.environ)
    study = ask(options, model.model, _flags(args), site)
    only = only_shape(study, parse_shape(options.only) if options.only else None)
    if options.print:
        print("\n".join(_commands(study, site, options, only)))
        return EXIT_DONE
    study.save()
    if options.submit:
        print("\n".join(submit(study, options, only)))
        return EXIT_DONE
    if not options.collect:
        Runner(study, site, options.run_timeout).run_all(study.runs(only))
    return _conclude(study, options.plots, only)


def _flags(args: argparse.Namespace) -> list[str]:
    """What all runs get, as flags."""
    from hpcinfer.supervision.flags import to_flags

    kinds = (ModelOptions, EngineOptions, SamplingParams)
    values = [(kind, given_options(args, kind)) for kind in kinds]
    return [flag for kind, given in values
            for flag in to_flags({name: value for name, value in given.items() if name != "model"}, kind,
                                 given_only=kind is SamplingParams)]  # fmt: skip


def _commands(study: "Study", site: "Site", options: StudyOptions, only: "Shape | None") -> "Iterator[str]":
    """The commands of all that is missing, as a shell takes them."""
    from hpcinfer.scaling.running import Runner
    from hpcinfer.scaling.submitting import batch_job, missing_shapes

    if options.submit:
        for shape in missing_shapes(study, only):
            yield _shown(batch_job(study, shape, options, os.environ))
        return
    for run in study.runs(only):
        started = None if run.is_done else Runner(study, site).command("study", run)
        if started:
            yield _shown(started)
        elif not run.is_done:
            yield f"# {run.point.run_name()}: {run.point.shape.nodes} nodes are not here"


def _shown(started: "Command") -> str:
    """A command with what it changes in the environment."""
    changed = [f"{name}={shlex.quote(value)}" for name, value in started.environment.items()
               if os.environ.get(name) != value]  # fmt: skip
    return " ".join([*changed, shlex.join(started.argv)])


def _conclude(study: "Study", plots: str, only: "Shape | None") -> int:
    """Write and print what was found; says with the exit code whether a run of ours failed or is missing."""
    from hpcinfer.recovery.durable import replace_bytes
    from hpcinfer.scaling.results import collect, same_bytes
    from hpcinfer.scaling.table import table, write_csv

    results = collect(study)
    lines = table(study, results)
    replace_bytes(study.folder / "table.txt", ("\n".join(lines) + "\n").encode())
    replace_bytes(study.folder / "results.csv", write_csv(results).encode())
    print("\n".join(lines))
    sys.stdout.flush()
    if only is None:
        _draw(study, results, plots)
    differs = any(len(digests) > 1 for digests in same_bytes(results).values())
    if differs or any(result.failures for result in results if only in (None, result.point.shape)):
        return EXIT_FAILED
    runs = study.runs(only)
    num_missing = sum(not run.is_done for run in runs)
    if num_missing:
        log.info("%d of %d runs are missing; the same command goes on", num_missing, len(runs))
    return EXIT_RESUMABLE if num_missing else EXIT_DONE


def _draw(study: "Study", results: "list[Result]", plots: str) -> None:
    if not importlib.util.find_spec("matplotlib"):
        log.warning("no plots: matplotlib is not installed (pip install matplotlib, or the extra `plot`)")
        return
    from hpcinfer.scaling.plots import draw

    draw(results, study.folder, plots)


if __name__ == "__main__":
    from hpcinfer.__main__ import main

    raise SystemExit(main(["study", *sys.argv[1:]]))
