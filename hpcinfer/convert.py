"""`hpcinfer convert`: a Hugging Face folder becomes a store; alone, or shared by the ranks of an mpirun."""

import argparse
import sys
from pathlib import Path

from hpcinfer.errors import EXIT_DONE

HELP = "turn a Hugging Face folder into a store"
EXAMPLE = "mpirun -n 8 hpcinfer convert /models/Llama-3.1-8B-Instruct llama.store"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("source", metavar="SRC", help="Hugging Face folder, hub-cache entry, or local hub name")
    parser.add_argument("store", metavar="DST", type=Path, help="folder to make; it must not exist yet")
    parser.add_argument(
        "--grains",
        type=int,
        metavar="G",
        default=None,
        help="smallest shards per layer, a power of two: the largest tensor-parallel size"
        " (default: 8, or 16 from about 60 B parameters)",
    )


def command(args: argparse.Namespace) -> int:
    """Convert, and say on the root what was made."""
    from hpcinfer.agree import on_all, where_am_i
    from hpcinfer.comm.world import end_together, start_world
    from hpcinfer.log import start_logging
    from hpcinfer.weights.conversion import Recipe, convert
    from hpcinfer.weights.locate import find_model
    from hpcinfer.weights.reader import Store

    group = start_world()
    start_logging(is_root=group.rank == 0, who=where_am_i(group))
    source = on_all(group, lambda: find_model(args.source))
    end_together(group, lambda: convert(source, args.store, group, Recipe(args.grains)))
    if group.rank == 0:
        store = Store.open(args.store)
        print(f"{args.store}: {store.config.architecture}, {store.grains} grains, {store.dtype}, digest {store.digest}")
    return EXIT_DONE


if __name__ == "__main__":
    from hpcinfer.__main__ import main

    sys.exit(main(["convert", *sys.argv[1:]]))
