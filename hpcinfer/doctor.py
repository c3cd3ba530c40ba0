"""`hpcinfer doctor`: look at MPI, nodes, network and file systems before a job starts, in 20 seconds."""

import argparse
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from hpcinfer.comm.launcher import let_first_speak, read_launch
from hpcinfer.comm.world import end_together, start_world
from hpcinfer.errors import EXIT_DONE, EXIT_FAILED, ConfigError, RankFailedError

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives
    from hpcinfer.diagnosis.examination import Examination
    from hpcinfer.diagnosis.facts import DoctorOptions
    from hpcinfer.diagnosis.guard import Guard

HELP = "look at MPI, nodes, network and file systems before a job starts, in 20 seconds"
EXAMPLE = "mpirun -n 4 hpcinfer doctor --model llama.store --output completions.jsonl"

_GRACE_S, _TURN_S = 2.0, 0.02  # the first rank speaks for all that wait; the others in turn, if it is lost


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--model", metavar="PATH", default="", help="the model of the job")
    parser.add_argument("--output", metavar="FILE", default="", help="the output of the job")
    parser.add_argument("--cache-dir", metavar="DIR", help="as of the job ($HPCINFER_CACHE if not given)")
    parser.add_argument("--threads", metavar="N", type=int, help="threads per rank, as of the job")
    parser.add_argument("-tp", "--tensor-parallel-size", metavar="N", type=int, default=1,
                        help="ranks that share each layer, as of the job (default: %(default)d)")
    parser.add_argument("-pp", "--pipeline-parallel-size", metavar="N", type=int, default=1,
                        help="stages that share the layers, as of the job (default: %(default)d)")
    parser.add_argument("--time-limit", metavar="S", type=float, default=20.0,
                        help="seconds after which ranks that still wait are named and ended (default: %(default)g)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def command(args: argparse.Namespace) -> int:
    """Examine this process, or all that the launcher started; 1 if there are errors."""
    from hpcinfer.diagnosis.facts import DoctorOptions
    from hpcinfer.diagnosis.guard import Guard
    from hpcinfer.diagnosis.telling import START, last_words

    def say_last(step: str, has_ended: bool) -> bytes:
        return last_words(step, args.time_limit, has_ended=has_ended, is_json=args.json).encode()

    sizes = args.tensor_parallel_size, args.pipeline_parallel_size
    options = DoctorOptions(args.model, args.output, args.cache_dir, args.threads, *sizes)
    visit = _Visit(options, args.json, time.monotonic(), args.time_limit)
    rank = read_launch().rank
    with Guard(args.time_limit, _GRACE_S + rank * _TURN_S if rank else 0.0, say_last) as guard:
        guard.step(START)
        try:
            world = start_world()
        except ConfigError:
            return _alone(visit)
        if world.size < read_launch().size:
            return _alone(visit)
        return end_together(world, lambda: _together(world, visit, guard))


class _Visit(NamedTuple):
    """What is examined, and how it is told."""

    options: "DoctorOptions"
    is_json: bool
    start_s: float  # on time.monotonic()
    limit_s: float

    def tell(self, examination: "Examination", who: str) -> int:
        """Print what was found, by whom; returns the exit code."""
        from hpcinfer.diagnosis.finding import ERROR
        from hpcinfer.diagnosis.telling import num_of, report

        print(report(examination, who, time.monotonic() - self.start_s, is_json=self.is_json), flush=True)
        return EXIT_FAILED if num_of(ERROR, examination.findings) else EXIT_DONE


def _alone(visit: _Visit) -> int:
    """Examine this process: there is no world of all that were started. The first speaks, unless only others fail."""
    from hpcinfer.comm.library import describe_library
    from hpcinfer.diagnosis.examination import examine_alone

    launch = read_launch()
    if launch.rank > 0:
        let_first_speak()
    mpi = describe_library(is_started=False)
    if launch.rank > 0 and mpi.name:
        return EXIT_FAILED
    return visit.tell(examine_alone(visit.options, mpi, launch.rank), f"rank {launch.rank} of {launch.size}, alone")


def _together(world: "Collectives", visit: _Visit, guard: "Guard") -> int:
    """Examine all ranks; the root tells. Collective over the world."""
    from hpcinfer.diagnosis.examination import examine

    try:
        examination = examine(world, visit.options, guard, visit.start_s + visit.limit_s)
    except RankFailedError:
        guard.step("a rank died, and rank 0 has not ended the job")
        time.sleep(2 * visit.limit_s)  # rank 0 or our guard ends this
        raise
    who = f"{world.size} rank{'s' * (world.size > 1)}"
    code = visit.tell(examination, who) if examination else EXIT_DONE
    if examination and not examination.is_complete:
        world.abort(code)
    guard.step("hearing the verdict of rank 0")
    return world.broadcast_bytes(bytes([code]) if world.rank == 0 else None)[0]


if __name__ == "__main__":
    from hpcinfer.__main__ import main

    raise SystemExit(main(["doctor", *sys.argv[1:]]))
