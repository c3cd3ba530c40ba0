"""The report of a run, put together from all ranks, and its trace. The root writes; what follows from what was measured
is made in `hpcinfer.report`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcinfer import __version__
from hpcinfer.comm.library import describe_library
from hpcinfer.config import RunOptions
from hpcinfer.dtypes import STORAGE
from hpcinfer.engine.placement import resolve_threads
from hpcinfer.errors import RankFailedError
from hpcinfer.partition.mesh import Mesh
from hpcinfer.recovery.merging import MAX_MERGERS, MergeReport
from hpcinfer.recovery.setup import Setup
from hpcinfer.recovery.stopping import Stopped
from hpcinfer.report.machine import describe_node, read_io
from hpcinfer.report.rates import loaded_s
from hpcinfer.report.run_phases import RunPhases
from hpcinfer.report.startup import STARTUP
from hpcinfer.weights.layout import num_weights
from hpcinfer.weights.reader import Store

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives
    from hpcinfer.report.energy import EnergyMeter

log = logging.getLogger(__name__)

_TAG_REPORT, _TAG_TRACE = 50, 51
_HASHED_WHOLE = 512 << 20  # bytes: of a larger file the root would read for too long, and only its digest is given
_PACKAGES = ("numpy", "h5py", "mpi4py", "torch")  # besides those that the numerics profile names


@dataclass(frozen=True)
class RunFacts:
    """What this rank knows of the run besides what it served."""

    options: RunOptions
    mesh: Mesh
    setup: Setup
    phases: RunPhases
    rank_report: dict[str, Any]
    placement: list[dict[str, Any]]  # of each rank, as the run began
    meter: EnergyMeter | None  # on the first rank of each node


def gather_reports(world: Collectives, facts: RunFacts) -> list[dict[str, Any]]:
    """Bring the reports of all ranks to the root; empty elsewhere. Collective over the world."""
    own = json.dumps(_own_report(facts)).encode()
    if world.rank != 0:
        world.send_bytes(own, 0, _TAG_REPORT).wait()
        return []
    return [json.loads(own), *(json.loads(world.receive_bytes(peer, _TAG_REPORT)) for peer in range(1, world.size))]


def _own_report(facts: RunFacts) -> dict[str, Any]:
    own = {**facts.rank_report, **facts.phases.to_json(), "io": {}, "node": None, "energy": None}
    with _costs_no_output("report of a rank"):
        own["io"] = read_io()
        if facts.phases.recording is not None:
            own["first_event_s"] = facts.phases.recording.first_s(facts.phases.began)
        if facts.meter is not None:
            own |= {"node": describe_node(), "energy": facts.meter.stop()}
    return own


def write_reports(facts: RunFacts, result: MergeReport | Stopped, ranks: list[dict[str, Any]]) -> None:
    """Write the report beside the job, and show the summary of one that has ended. Not collective; on the root."""
    with _costs_no_output("summary"):
        from hpcinfer.report.summary import summary_lines  # on the root alone: a thousand ranks read no files for it

        run, page = _run(facts, result, ranks), None
        with _costs_no_output("report"):
            from hpcinfer.report.document import complete_report
            from hpcinfer.report.files import write_report

            measured = _measured(facts, result, run, ranks)
            page = write_report(facts.setup.job.paths.root, complete_report(measured, STARTUP.age_s))
        for line in summary_lines(run, ranks, page) if isinstance(result, MergeReport) else ():
            log.info("%s", line)


def _run(facts: RunFacts, result: MergeReport | Stopped, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What is known of the run as a whole."""
    merged = result if isinstance(result, MergeReport) else None
    failed = merged.num_failed if merged else sum(sum(rank["errors"].values()) for rank in ranks)
    setup, defaults, options = facts.setup, facts.setup.preparation.defaults, facts.options
    is_native = setup.kernels.name == "native"
    return {
        "mesh": str(facts.mesh),
        "world_size": len(ranks),
        "placement": facts.placement,
        "input_kind": setup.job.kind,
        "stopped": "" if isinstance(result, MergeReport) else result.reason,
        "num_rows": result.num_rows,
        "num_done": result.num_done,
        "num_failed": failed,
        "num_mergers": min(MAX_MERGERS, len(ranks)),
        "output_bytes": merged.size_bytes if merged else 0,
        "bytes_per_weight": 4.0 if is_native and setup.store.quantization == "none" else _stored_bytes(setup.store)[1],
        "threads": resolve_threads(options.engine.threads, os.environ) if is_native else 1,
        "has_stage": setup.store.has_stage,
        "kv_cache_bytes": facts.rank_report["kv_cache_bytes"],
        "num_blocks": facts.rank_report["num_blocks"],
        "seconds": dict(facts.phases.seconds),
        "loaded_s": loaded_s(ranks),
        "sampling": dataclasses.asdict(defaults.values),
        "origins": defaults.origins,
        "options": dataclasses.asdict(options.engine),
    }


def _measured(
    facts: RunFacts, result: MergeReport | Stopped, run: dict[str, Any], ranks: list[dict[str, Any]]
) -> dict[str, Any]:
    """All that `complete_report` takes."""
    setup, model = facts.setup, _model(facts.setup.store, facts.options.model.model)
    return {
        "asked": facts.options.flat(), "model": model, "software": _software(setup), "precision": _precision(setup),
        "seed": setup.job.manifest["seed"], "files": _files(facts.options, setup, result), "run": run, "ranks": ranks,
    }  # fmt: skip


def write_traces(world: Collectives, facts: RunFacts, ranks: list[dict[str, Any]]) -> None:
    """Write what all ranks have recorded into one trace. Collective over the world; only one rank's is in memory."""
    recording = facts.phases.recording
    if recording is None:
        return
    if world.rank != 0:
        own = json.dumps(recording.to_json(facts.phases.began)).encode()
        world.send_bytes(own, 0, _TAG_TRACE).wait()
        return

    def recorded() -> Iterator[dict[str, Any]]:
        yield recording.to_json(facts.phases.began)
        for peer in range(1, world.size):
            yield json.loads(world.receive_bytes(peer, _TAG_TRACE))

    path, pieces = facts.setup.job.paths.root / "trace.json", recorded()
    with _costs_no_output("trace"):
        from hpcinfer.report.events import happenings
        from hpcinfer.report.files import write_whole
        from hpcinfer.report.trace import write_trace

        write_whole(path, lambda file: write_trace(file, ranks, pieces, happenings(ranks)))
        log.info("trace     %s", path)
    for _ in pieces:  # whoever sends waits until it is taken
        continue


@contextmanager
def _costs_no_output(what: str) -> Iterator[None]:
    """Let a full disk, or a bug of ours, cost the report: the job is complete."""
    try:
        yield
    except RankFailedError:
        raise
    except Exception:
        log.exception("the %s could not be written; the output is complete", what)


def _software(setup: Setup) -> dict[str, str]:
    """Versions by name; "" is not installed."""
    library = describe_library(is_started=True).name
    found = {"hpcinfer": __version__, "MPI": library or "none", **setup.job.manifest["numerics"]}
    for name in ("dtype", "kv_cache"):
        found.pop(name, None)
    for package in _PACKAGES:
        try:
            found.setdefault(package, version(package))
        except PackageNotFoundError:
            found[package] = ""
    return found


def _precision(setup: Setup) -> dict[str, str]:
    numerics = setup.job.manifest["numerics"]
    return {"dtype": numerics["dtype"], "kv_cache": numerics["kv_cache"], "kernels": setup.kernels.name}


def _stored_bytes(store: Store) -> tuple[int, float]:
    """Bytes in the store, padding included, and bytes per weight."""
    sizes = {each: STORAGE[param.dtype].itemsize for each, param in store.parameters.items()}
    num_bytes = sum(math.prod(store.spec(each).shape) * size for each, size in sizes.items())
    return num_bytes, num_bytes / num_weights(store.config)


def _model(store: Store, name: str) -> dict[str, Any]:
    (num_bytes, each_bytes), count, config = _stored_bytes(store), num_weights(store.config), store.config
    kinds = ", ".join(sorted({param.dtype for param in store.parameters.values()}))
    return {
        "name": name, "digest": store.digest, "architecture": config.architecture, "num_weights": count,
        "bytes_per_weight": each_bytes, "stored_bytes": num_bytes, "grains": store.grains,
        "weights": kinds if store.quantization == "none" else store.quantization,
        "num_layers": config.num_layers, "hidden_size": config.hidden_size, "store": str(store.path),
    }  # fmt: skip


def _files(options: RunOptions, setup: Setup, result: MergeReport | Stopped) -> dict[str, Any]:
    said = setup.job.manifest["input"]
    source, target = Path(options.job.input), setup.job.paths.output
    size_bytes, digest = (result.size_bytes, result.digest) if isinstance(result, MergeReport) else (0, "")
    return {
        "input": {"path": str(source), "size_bytes": said["size_bytes"], "digest": said["digest"],
                  "sha256": None if isinstance(result, Stopped) else _sha256(source, said["size_bytes"])},
        "output": {"path": str(target), "size_bytes": size_bytes, "digest": digest or None,
                   "sha256": _sha256(target, size_bytes) if digest else None},
    }  # fmt: skip


def _sha256(path: Path, size_bytes: int) -> str | None:
    """SHA-256 as other tools have it; None of a large file."""
    if size_bytes > _HASHED_WHOLE:
        return None
    state = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            state.update(data)
    return state.hexdigest()
