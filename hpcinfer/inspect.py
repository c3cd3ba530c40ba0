"""`hpcinfer inspect`: what a store or a job directory holds. Needs neither MPI nor torch."""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hpcinfer.errors import EXIT_DONE, ConfigError
from hpcinfer.units import format_bytes

if TYPE_CHECKING:
    from hpcinfer.weights.reader import Store

HELP = "show what a store or a job directory holds"
EXAMPLE = "hpcinfer inspect llama.store"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("path", metavar="PATH", type=Path, help="a store, a job directory, or the output of a job")
    parser.add_argument("--verify", action="store_true", help="read a whole store and compare all checksums")


def command(args: argparse.Namespace) -> int:
    """Print a description of the path."""
    from hpcinfer.weights.reader import Store, is_store

    job = Path(f"{args.path}.job")
    if (args.path / "manifest.json").is_file() or job.is_dir():
        from hpcinfer.recovery.describe import describe

        lines = describe(args.path if args.path.is_dir() else job)
    elif is_store(args.path):
        with Store.open(args.path) as store:
            lines = describe_store(store, verify=args.verify)
    else:
        raise ConfigError(
            f"{args.path} is neither a store nor a job",
            expected="a folder with index.h5 or manifest.json",
            hint="of a Hugging Face folder, hpcinfer convert makes a store",
        )
    print("\n".join(lines))
    return EXIT_DONE


def describe_store(store: "Store", *, verify: bool = False) -> list[str]:
    """Describe a store in lines of text.

    Raises:
        StoreError: damage, if `verify` asks for reading everything.
    """
    lines = [
        f"store {store.path}",
        f"  written by   hpcinfer {store.hpcinfer_version}",
        f"  digest       {store.digest}",
        *_model_lines(store),
        *_file_lines(store),
    ]
    lines += [f"  tokenizer    {', '.join(sorted(store.tokenizer_files))}"]
    lines += [
        f"  made of      {file['name']}, {format_bytes(file['size'])}, sha256 {file['sha256']}"
        for file in store.source_files
    ]
    if verify:
        store.verify()
        lines.append(f"  verified     {format_bytes(store.num_bytes)}, all checksums agree")
    return lines


def _model_lines(store: "Store") -> list[str]:
    config = store.config
    windows = sorted(set(config.windows) - {0})
    return [
        f"  model        {config.architecture}, {config.num_layers} layers, hidden {config.hidden_size}, MLP "
        f"{config.intermediate_size}, vocabulary {config.vocab_size}{' (tied)' if config.tie_word_embeddings else ''}",
        f"  heads        {config.num_heads} query, {config.num_kv_heads} KV, of {config.head_size}",
        f"  positions    {config.max_position_embeddings}, rope {config.rope_scaling.rope_type},"
        f" theta {config.rope_theta:g}" + (f", window {', '.join(map(str, windows))}" if windows else ""),
        f"  dtype        {', '.join(sorted({param.dtype for param in store.parameters.values()}))}",
        *_weights_lines(store),
        f"  grains       {store.grains}: tensor-parallel sizes 1 to {store.grains},"
        f" pipeline-parallel sizes 1 to {config.num_layers}",
    ]


def _weights_lines(store: "Store") -> list[str]:
    from hpcinfer.dtypes import STORAGE
    from hpcinfer.weights.layout import num_weights

    sizes = {name: STORAGE[param.dtype].itemsize for name, param in store.parameters.items()}
    num_bytes = sum(math.prod(store.spec(name).shape) * size for name, size in sizes.items())
    kind = "as in the checkpoint" if store.quantization == "none" else f"quantised to {store.quantization}"
    each = f"{num_bytes / num_weights(store.config):.3f} bytes per weight, padding included"
    lines = [f"  weights      {kind}, {format_bytes(num_bytes)}, {each}"]
    if facts := store.calibration:
        text = f"{facts['tokens']} tokens in {facts['windows']} windows, sha256 {facts['sha256']}"
        lines.append(f"  calibrated   on {text}")
    return lines


def _file_lines(store: "Store") -> list[str]:
    names = sorted({param.file for param in store.parameters.values()})
    lines = [f"  {'file':<16} {'parameters':>10} {'chunks':>7} {'size':>11}"]
    for name in ("index.h5", *names):
        held = [param for param in store.parameters.values() if param.file == name]
        path = store.path / name
        size = format_bytes(path.stat().st_size) if path.exists() else "MISSING"
        lines.append(f"  {name:<16} {len(held):>10} {sum(len(param.checksums) for param in held):>7} {size:>11}")
    return lines


if __name__ == "__main__":
    from hpcinfer.__main__ import main

    sys.exit(main(["inspect", *sys.argv[1:]]))
