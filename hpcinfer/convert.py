"""`hpcinfer convert`: a Hugging Face folder becomes a store; alone, or shared by the ranks of an mpirun."""

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hpcinfer.errors import EXIT_DONE, ConfigError

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives
    from hpcinfer.weights.conversion import Recipe

HELP = "turn a Hugging Face folder into a store"
EXAMPLE = "mpirun -n 8 hpcinfer convert /models/Llama-3.1-8B-Instruct llama.store"

log = logging.getLogger(__name__)


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
    parser.add_argument(
        "--quantize",
        choices=("none", "int8", "fp8", "int4"),
        default="none",
        help="store weights as codes with scales (default: none); embeddings and output head become int8",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        default=None,
        help="text, or prompts as .jsonl, like what the model will see: int4 is rounded with respect to it; the first"
        " 131,072 tokens count (default: round to nearest)",
    )


def command(args: argparse.Namespace) -> int:
    """Convert, and say on the root what was made."""
    from hpcinfer.agree import on_all, where_am_i
    from hpcinfer.comm.world import end_together, start_world
    from hpcinfer.log import start_logging
    from hpcinfer.weights.conversion import convert
    from hpcinfer.weights.locate import find_model
    from hpcinfer.weights.reader import Store

    group = start_world()
    start_logging(is_root=group.rank == 0, who=where_am_i(group))
    source = on_all(group, lambda: find_model(args.source))
    recipe = on_all(group, lambda: _recipe(args, source, group))
    end_together(group, lambda: convert(source, args.store, group, recipe))
    if group.rank == 0:
        store = Store.open(args.store)
        kind = store.dtype if args.quantize == "none" else args.quantize
        print(f"{args.store}: {store.config.architecture}, {store.grains} grains, {kind}, digest {store.digest}")
    return EXIT_DONE


def _recipe(args: argparse.Namespace, folder: Path, group: "Collectives") -> "Recipe":
    from hpcinfer.model.calibration import Calibration
    from hpcinfer.weights.conversion import Recipe

    if args.calibration is None:
        if args.quantize == "int4" and group.rank == 0:
            log.info("rounding to nearest; with --calibration FILE int4 loses less")
        return Recipe(args.grains, args.quantize)
    if args.quantize != "int4":
        raise ConfigError(
            f"--calibration with --quantize {args.quantize}",
            expected="--quantize int4: the others do not depend on a text",
            hint="leave --calibration out",
        )
    windows = _calibration_windows(args.calibration, folder)
    return Recipe(args.grains, args.quantize, lambda source, grains: Calibration(source, grains, windows, group))


def _calibration_windows(text: Path, folder: Path) -> list[tuple[int, ...]]:
    """Read and cut the text with the tokenizer of a Hugging Face folder."""
    from hpcinfer.data.tokenizer import Tokenizer
    from hpcinfer.data.windows import cut_windows, first_tokens, prompt_ids
    from hpcinfer.model.calibration import MAX_WINDOWS, WINDOW
    from hpcinfer.weights.source import Source

    with Source(folder) as source:
        tokenizer, config = Tokenizer(source.tokenizer_files), source.config
    ids = prompt_ids(text, tokenizer, config.vocab_size)
    windows = cut_windows(ids, min(WINDOW, config.max_position_embeddings), first_tokens(tokenizer))[:MAX_WINDOWS]
    if not windows:
        raise ConfigError(
            f"{len(ids)} tokens to calibrate with",
            expected="some thousand tokens, better 100,000",
            where=str(text),
            hint="another text, or none: leave --calibration out",
        )
    return windows


if __name__ == "__main__":
    from hpcinfer.__main__ import main

    sys.exit(main(["convert", *sys.argv[1:]]))
