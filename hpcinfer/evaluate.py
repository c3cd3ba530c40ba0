"""`hpcinfer evaluate`: how well a model predicts a text, for comparing stores; alone, or on the ranks of an mpirun."""

import argparse
import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcinfer.agree import on_all, on_root, same_everywhere, where_am_i
from hpcinfer.cli import add_options, read_options
from hpcinfer.comm.imports import share_imports
from hpcinfer.comm.launcher import check_world_size
from hpcinfer.comm.topology import discover
from hpcinfer.comm.world import end_together, start_world
from hpcinfer.config import EngineOptions, MeshOptions, ModelOptions
from hpcinfer.errors import EXIT_DONE, ConfigError
from hpcinfer.log import start_logging
from hpcinfer.partition.layout import ModelLimits, layout_of
from hpcinfer.partition.mesh import Mesh, resolve_mesh
from hpcinfer.partition.placement import place_ranks

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives, World
    from hpcinfer.data.tokenizer import Tokenizer
    from hpcinfer.engine.evaluation import Likelihood, Window
    from hpcinfer.kernels.protocol import Kernels
    from hpcinfer.weights.reader import Store

HELP = "measure a model's perplexity on a text"
EXAMPLE = "hpcinfer evaluate --model llama.store --compare llama-int4.store --text held_out.txt"

_WINDOW = 1024  # tokens, unless told otherwise
_MODULES = (  # that all ranks import, with all that these import
    "hpcinfer.engine.evaluation", "hpcinfer.kernels.native.native", "hpcinfer.weights.opening", "tokenizers", "h5py",
)  # fmt: skip


@dataclass(frozen=True)
class EvaluateOptions:
    """All options of an evaluation."""

    model: ModelOptions
    mesh: MeshOptions
    engine: EngineOptions
    text: str
    compare: str  # another model, or ""
    json: bool

    @property
    def models(self) -> list[str]:
        """What is measured, in order."""
        return [self.model.model, *filter(None, [self.compare])]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--text", metavar="FILE", required=True, help="text in UTF-8 that the model was not trained on")
    parser.add_argument("--compare", metavar="PATH", default="", help="a second model, on the same windows of the text")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_options(parser, ModelOptions, title="model (windows have --max-model-len tokens, 1024 if not given)")
    add_options(parser, MeshOptions, title="mesh")
    add_options(parser, EngineOptions, title="engine (changes no result)")


def command(args: argparse.Namespace) -> int:
    """Evaluate on all ranks that were launched; the root prints."""
    options = EvaluateOptions(
        model=read_options(args, ModelOptions),
        mesh=read_options(args, MeshOptions),
        engine=read_options(args, EngineOptions),
        text=args.text,
        compare=args.compare,
        json=args.json,
    )
    world = start_world()
    start_logging(is_root=world.rank == 0, who=where_am_i(world) if world.size > 1 else "")
    end_together(world, lambda: share_imports(world, _MODULES))
    results = end_together(world, lambda: _evaluate(world, options))
    if world.rank == 0:
        text = json.dumps(_as_json(results), allow_nan=False) if options.json else "\n".join(_as_lines(results))
        print(text, flush=True)
    return EXIT_DONE


@dataclass(frozen=True)
class _Result:
    """What came of one model."""

    model: str
    digest: str
    quantization: str
    likelihood: "Likelihood"


def _evaluate(world: "World", options: EvaluateOptions) -> list[_Result]:
    from hpcinfer.engine.placement import check_sharing, make_kernels

    mesh = on_all(world, lambda: _check(world, options))
    same_everywhere(world, dataclasses.asdict(options), "the options")
    world.locations = discover(world)
    placed = world.split(0, place_ranks(mesh, world.locations).index(world.rank))
    stores = [_open_store(world, model, options) for model in options.models]
    tokenizer, windows = _read_windows(world, stores, options)
    kernels = on_all(world, lambda: make_kernels(options.model, options.engine.threads))
    if options.model.device == "cuda":
        check_sharing(world, kernels, options.model.ranks_per_gpu)
    same_everywhere(world, kernels.profile(), "the numerics profiles")
    results = []
    for model, store in zip(options.models, stores, strict=True):
        store.allocate = kernels.staging
        likelihood = _measure(world, mesh, options, _Work(placed, store, kernels, tokenizer, windows))
        results.append(_Result(model, store.digest, store.quantization, likelihood))
    return results


def _check(world: "Collectives", options: EvaluateOptions) -> Mesh:
    from hpcinfer.engine.options import check_engine_options

    check_world_size(world.size)
    if not options.model.model:
        raise ConfigError("no --model", expected="a store or a Hugging Face folder", hint="hpcinfer evaluate --help")
    check_engine_options(options.engine)
    sizes = options.mesh
    return resolve_mesh(
        world.size, sizes.tensor_parallel_size, sizes.pipeline_parallel_size, sizes.data_parallel_size
    )


def _open_store(world: "Collectives", model: str, options: EvaluateOptions) -> "Store":
    """Find a model, converted if need be. Collective over the world."""
    from hpcinfer.weights.locate import resolve_model
    from hpcinfer.weights.opening import open_store

    path = resolve_model(model, options.model.cache_dir, world)
    return open_store(path, world, options.model.stage)


def _read_windows(
    world: "Collectives", stores: list["Store"], options: EvaluateOptions
) -> tuple["Tokenizer", list["Window"]]:
    """Read and cut the text on the root, for all ranks. Collective over the world."""
    from hpcinfer.data.tokenizer import Tokenizer

    tokenizer = on_all(world, lambda: Tokenizer(stores[0].tokenizer_files))
    data = on_root(world, lambda: json.dumps(_cut_text(stores, tokenizer, options)).encode())
    return tokenizer, [tuple(window) for window in json.loads(data)]


def _cut_text(stores: list["Store"], tokenizer: "Tokenizer", options: EvaluateOptions) -> list["Window"]:
    from hpcinfer.data.windows import cut_windows, first_tokens, text_ids
    from hpcinfer.engine.options import resolve_max_model_len

    files = {store.tokenizer_files["tokenizer.json"] for store in stores}
    if len(files) > 1:
        raise ConfigError(
            f"{options.compare} has another tokenizer.json than {options.model.model}",
            expected="models of one vocabulary",
            hint="evaluate each alone and compare bits per byte",
        )
    wanted = options.model.max_model_len
    length = min(resolve_max_model_len(store.config, wanted) for store in stores)
    ids = text_ids(Path(options.text), tokenizer, min(store.config.vocab_size for store in stores))
    windows = cut_windows(ids, min(length, wanted or _WINDOW), first_tokens(tokenizer))
    if not windows:
        raise ConfigError(f"{len(ids)} tokens in {options.text}", expected="a text, and windows of at least 2 tokens")
    return windows


@dataclass(frozen=True)
class _Work:
    """What is measured with what."""

    placed: "Collectives"  # all ranks, in the order of the mesh
    store: "Store"
    kernels: "Kernels"
    tokenizer: "Tokenizer"
    windows: list["Window"]


def _measure(world: "Collectives", mesh: Mesh, options: EvaluateOptions, work: _Work) -> "Likelihood":
    """Load one model and score the windows. Collective over the world."""
    from hpcinfer.comm.form_table import load_selector
    from hpcinfer.engine.evaluation import measure
    from hpcinfer.engine.options import ReplicaOptions
    from hpcinfer.engine.placement import resolve_cache_dtype, resolve_dtype
    from hpcinfer.engine.replica import build_replica, build_together, join_replica
    from hpcinfer.model.common import keeps_table
    from hpcinfer.recovery.loading import JobLoading

    dtype, length = resolve_dtype(options.model), max(map(len, work.windows))
    cache_dtype = resolve_cache_dtype(options.model)
    selector = load_selector(world, options.engine.collectives, options.engine.overlap_sums)
    wanted = ReplicaOptions(options.engine, dtype, length, seed=0, cache_dtype=cache_dtype, selector=selector)
    group, config = join_replica(work.placed, mesh), work.store.config
    layout = layout_of(mesh, range(mesh.world_size), ModelLimits(config.num_layers, work.store.grains))
    loading = JobLoading(work.store, layout)
    loading.begin(work.placed, None, keeps_table=keeps_table(work.store, work.kernels, dtype))
    load = partial(loading.load, work.kernels, wanted.metrics)
    try:
        replica = build_together(world, lambda: build_replica(group, mesh, work.store, work.kernels, wanted, load))
    except Exception:
        loading.stop()
        raise
    likelihood = measure(work.placed, mesh, replica, work.tokenizer, work.windows)
    loading.finish()
    return likelihood


def _difference(results: list[_Result]) -> float | None:
    """Percent by which the second model's perplexity is above the first's."""
    if len(results) < 2:
        return None
    first, second = (result.likelihood.perplexity for result in results)
    return 100 * (second / first - 1)


def _as_json(results: list[_Result]) -> dict[str, Any]:
    models = [
        {
            "model": result.model,
            "digest": result.digest,
            "quantization": result.quantization,
            **result.likelihood._asdict(),
            "nats": _finite(result.likelihood.nats),
            "nats_per_token": _finite(result.likelihood.nats_per_token),
            "perplexity": _finite(result.likelihood.perplexity),
            "bits_per_byte": _finite(result.likelihood.bits_per_byte),
        }
        for result in results
    ]
    return {"models": models, "difference_percent": _finite(_difference(results))}


def _finite(value: float | None) -> float | None:
    """What JSON can say of a number."""
    return value if value is not None and math.isfinite(value) else None


def _as_lines(results: list[_Result]) -> list[str]:
    lines = []
    for result in results:
        found = result.likelihood
        kind = "" if result.quantization == "none" else f" ({result.quantization})"
        lines += [
            f"{result.model}{kind}",
            f"  perplexity   {found.perplexity:.4f}",
            f"  per token    {found.nats_per_token:.6f} nats, {found.num_tokens} tokens in {found.num_windows} windows",
            f"  per byte     {found.bits_per_byte:.6f} bits, {found.num_bytes} bytes",
            f"  in all       {found.nats:.4f} nats",
        ]
    difference = _difference(results)
    return lines if difference is None else [*lines, f"difference     {difference:+.3f} % in perplexity"]


if __name__ == "__main__":
    from hpcinfer.__main__ import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
