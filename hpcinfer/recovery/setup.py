"""Setting a job up: options checked, model and input found, job directory opened. Fails on all ranks or on none."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpcinfer.agree import on_all, on_root, same_everywhere
from hpcinfer.comm.form_table import load_selector
from hpcinfer.comm.seating import describe_seats
from hpcinfer.comm.selector import Selector
from hpcinfer.comm.topology import Survey, survey
from hpcinfer.comm.world import open_line
from hpcinfer.config import RunOptions
from hpcinfer.data.prepare import Preparation, check_defaults
from hpcinfer.data.sampling_defaults import SamplingDefaults, read_generation_config, resolve_defaults
from hpcinfer.data.tokenizer import TokenizerSource
from hpcinfer.data.versions import find_libraries
from hpcinfer.data.versions import profile as data_profile
from hpcinfer.engine.options import ReplicaOptions, check_engine_options, resolve_max_model_len
from hpcinfer.engine.placement import check_sharing, make_kernels, resolve_cache_dtype, resolve_dtype
from hpcinfer.errors import ConfigError
from hpcinfer.kernels.protocol import Kernels
from hpcinfer.model.shard import shard_plan
from hpcinfer.partition.layout import ModelLimits, layout_of
from hpcinfer.partition.mesh import Mesh, resolve_mesh
from hpcinfer.partition.placement import place_ranks
from hpcinfer.recovery.election import Election
from hpcinfer.recovery.inflight import start_name
from hpcinfer.recovery.job import Job, check_job_options, find_input, open_job
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.loading import JobLoading
from hpcinfer.recovery.merging import MergeReport, read_complete
from hpcinfer.recovery.serve import Serving
from hpcinfer.recovery.stopping import Stopped, Stopper, agree_to_stop
from hpcinfer.recovery.time_limit import agree_time_limit
from hpcinfer.report.metrics import Metrics
from hpcinfer.weights.locate import Preview, ensure_store, locate_model, preview
from hpcinfer.weights.opening import open_store
from hpcinfer.weights.reader import Store

if TYPE_CHECKING:
    from hpcinfer.comm.mpi import MpiGroup
    from hpcinfer.comm.protocol import Collectives, World

log = logging.getLogger(__name__)

_TOLERANT = "fault tolerance: when a rank dies the others go on"
_FRAGILE = (
    "fault tolerance: none in this MPI or launcher (mpiexec --with-ft ulfm has it); when a rank dies all end, and"
    " hpcinfer supervise, or the same command, goes on"
)


@dataclass(frozen=True)
class Setup:
    """What is known before weights are loaded."""

    store: Store
    kernels: Kernels
    job: Job
    preparation: Preparation
    name: str  # of this MPI job, as no other one is called
    places: Survey  # of its ranks
    selector: Selector = Selector()  # of forms of sums
    stopped: Stopped | None = None  # before anything was loaded
    complete: MergeReport | None = None  # of the last merge, if nothing is left to do


def prepare(
    world: World, launched: int, options: RunOptions, phases: Metrics, stopper: Stopper
) -> tuple[Mesh, Setup, MpiGroup | None]:
    """Check and find everything, for as many ranks as were launched, though some may have died since.

    Collective over the world; fails everywhere or nowhere.
    """
    mesh = on_all(world, lambda: _check(launched, options, is_tolerant=world.is_tolerant))
    if world.size > 1:
        log.info(_TOLERANT if world.is_tolerant else _FRAGILE)
    same_everywhere(world, options.flat(), "the options")
    stopper.time_limit = agree_time_limit(options.job, world)
    places = survey(world)  # before kernels bind this rank to CPUs
    world.locations = places.locations
    setup = _set_up(world, mesh, options, phases, places)
    stopped, complete = agree_to_stop(stopper, setup.job, world), _read_complete(world, setup.job)
    selector = load_selector(world, options.engine.collectives, options.engine.overlap_sums)
    setup = dataclasses.replace(setup, stopped=stopped, complete=complete, selector=selector)
    return mesh, setup, open_line(world)


def serving_of(
    mail: Collectives, mesh: Mesh, options: RunOptions, setup: Setup, stopper: Stopper
) -> Serving:
    """Say what is served, on which ranks. Not collective."""
    dtype, max_model_len = resolve_dtype(options.model), setup.preparation.max_model_len
    limits = ModelLimits(setup.store.config.num_layers, setup.store.grains)
    layout = layout_of(mesh, place_ranks(mesh, setup.places.locations), limits)
    if setup.places.num_nodes > 1:
        log.info("placement: %s", describe_seats(layout, setup.places))
    return Serving(
        name=setup.name,
        job=setup.job,
        preparation=setup.preparation,
        store=setup.store,
        kernels=setup.kernels,
        options=ReplicaOptions(
            options.engine, dtype, max_model_len, options.job.seed, resolve_cache_dtype(options.model), setup.selector
        ),
        model_name=f"hpcinfer-{setup.store.digest[:12]}",
        lease_timeout_s=options.job.lease_timeout,
        refill=options.job.refill,
        layout=layout,
        loading=JobLoading(setup.store, layout),
        mail=mail,
        election=Election(setup.job.paths.claimants, setup.name, layout.replicas[0].members[0]),
        stopper=stopper,
    )


def _set_up(
    world: Collectives, mesh: Mesh, options: RunOptions, phases: Metrics, places: Survey
) -> Setup:
    """Find the model and the input, open the job directory. Collective over the world; fails everywhere or nowhere."""
    with phases.phase("input"):
        source = find_input(options.job, world)
    with phases.phase("model"):
        fallback = JobPaths(Path(options.job.output)).root / "store"
        located = locate_model(options.model.model, options.model.cache_dir, world, fallback)
        found = None if located.source else open_store(Path(located.store), world, options.model.stage)
        model = on_all(world, lambda: preview(located, found))
        checked = on_all(world, lambda: _check_model(model, mesh, options, reads_tokenizer=world.rank == 0))
        kernels = on_all(world, lambda: make_kernels(options.model, options.engine.threads))
        store = found or open_store(ensure_store(located, world), world, options.model.stage)
        store.allocate = kernels.staging
    if options.model.device == "cuda":
        check_sharing(world, kernels, options.model.ranks_per_gpu)
    dtypes = {"dtype": resolve_dtype(options.model), "kv_cache": resolve_cache_dtype(options.model)}
    profile = {**kernels.profile(), **data_profile(on_root(world, find_libraries)), **dtypes}
    same_everywhere(world, profile, "the numerics profiles")
    manifest = {
        "model": {"digest": store.digest, "max_model_len": checked.max_model_len},
        "sampling": dataclasses.asdict(checked.defaults.values),
        "numerics": profile,
        "informative": {"model": options.model.model, "origins": checked.defaults.origins},
    }
    with phases.phase("index"):
        job = open_job(options.job, source, manifest, world)
    preparation = Preparation(
        checked.source, job.template_date, checked.defaults, checked.max_model_len, store.config.vocab_size, job.kind
    )
    name = start_name(world)
    return Setup(store, kernels, job, preparation, name, places)


@dataclass(frozen=True)
class _CheckedModel:
    """What the options come to with this model."""

    max_model_len: int
    source: TokenizerSource
    defaults: SamplingDefaults


def _check_model(model: Preview, mesh: Mesh, options: RunOptions, *, reads_tokenizer: bool) -> _CheckedModel:
    """Check all options against the model, before anything is converted."""
    source = TokenizerSource(model.tokenizer_files)
    if reads_tokenizer:
        _ = source.tokenizer
    shard_plan(model.config, model.grains, mesh, mesh.coord(0))
    defaults = resolve_defaults(options.sampling, read_generation_config(model.tokenizer_files))
    check_defaults(defaults, model.config.vocab_size)
    max_model_len = resolve_max_model_len(model.config, options.model.max_model_len)
    return _CheckedModel(max_model_len, source, defaults)


def _read_complete(world: Collectives, job: Job) -> MergeReport | None:
    """Report of the merge, if the job is complete: read by the root, so that all ranks take one way. Collective."""

    def read() -> bytes:
        report = read_complete(job.paths)
        return json.dumps(report).encode() if report else b""

    data = on_root(world, read)
    return MergeReport(*json.loads(data)) if data else None


def _check(world_size: int, options: RunOptions, *, is_tolerant: bool) -> Mesh:
    """Check what needs no file."""
    if not options.model.model:
        raise ConfigError("no --model", expected="a store or a Hugging Face folder", hint="hpcinfer run --help")
    check_job_options(options.job)
    check_engine_options(options.engine)
    sizes = options.mesh
    if not 0 <= sizes.spare_ranks < world_size:
        raise ConfigError(f"--spare-ranks {sizes.spare_ranks}", expected=f"from 0 to {world_size - 1}")
    if sizes.spare_ranks and not is_tolerant:
        raise ConfigError(
            f"--spare-ranks {sizes.spare_ranks}, but this MPI ends the job when a rank dies",
            expected="mpiexec --with-ft ulfm, of Open MPI 5 or newer",
            hint="leave out --spare-ranks: the same command, or hpcinfer supervise, goes on after a death",
        )
    return resolve_mesh(
        world_size - sizes.spare_ranks, sizes.tensor_parallel_size, sizes.pipeline_parallel_size,
        sizes.data_parallel_size,
    )  # fmt: skip
