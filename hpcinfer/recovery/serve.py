"""Serving a job: what a rank does between the loaded model and the complete journal, also when others die."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hpcinfer.comm.tolerant import TolerantGroup
from hpcinfer.data.prepare import Preparation, Preparer
from hpcinfer.engine.options import ReplicaOptions
from hpcinfer.engine.replica import Replica, build_replica
from hpcinfer.kernels.protocol import Kernels
from hpcinfer.model.common import keeps_table
from hpcinfer.model.weights_of import WeightSource
from hpcinfer.partition.layout import Layout, ModelLimits
from hpcinfer.partition.mesh import Mesh
from hpcinfer.recovery.election import Election
from hpcinfer.recovery.feeder import RowCounts
from hpcinfer.recovery.job import Job
from hpcinfer.recovery.loading import JobLoading
from hpcinfer.recovery.stopping import Stopper
from hpcinfer.report.metrics import Metrics
from hpcinfer.report.startup import STARTUP
from hpcinfer.weights.reader import Store

if TYPE_CHECKING:
    from hpcinfer.comm.mpi import MpiGroup
    from hpcinfer.comm.protocol import Collectives


@dataclass(frozen=True)
class Serving:
    """What is served, with what, on which ranks."""

    name: str  # of this start of the job
    job: Job
    preparation: Preparation
    store: Store
    kernels: Kernels
    options: ReplicaOptions
    model_name: str  # in records whose request does not name a model
    lease_timeout_s: float
    refill: str  # where weights come from after a death: auto, sister or store
    layout: Layout
    loading: JobLoading  # the first one, as the layout says
    mail: Collectives  # all ranks, for the messages of dealing; a line where ranks may die
    election: Election
    stopper: Stopper

    @property
    def preparer(self) -> Preparer:
        """What makes requests of rows, on a rank that leads."""
        return self.preparation.preparer

    @property
    def limits(self) -> ModelLimits:
        """What the model sets to a mesh."""
        return ModelLimits(self.store.config.num_layers, self.store.grains)

    def measured_by(self, metrics: Metrics) -> Serving:
        """The same with other metrics of this rank. Not collective."""
        return dataclasses.replace(self, options=dataclasses.replace(self.options, metrics=metrics))

    def build_first(self, world: Collectives, line: MpiGroup | None) -> Replica | None:
        """Let this rank's part come as the layout says; None on a spare rank. Collective over the world."""
        places = [(i, r) for i, r in enumerate(self.layout.replicas) if world.rank in r.members]
        index, place = places[0] if places else (len(self.layout.replicas), None)
        if line is None:
            key = world.rank if place is None else place.members.index(world.rank)
            group: Collectives = world.split(index, key)
        elif place is not None:
            group = TolerantGroup(line, place.members, epoch=1)
        as_stored = keeps_table(self.store, self.kernels, self.options.dtype)
        self.loading.begin(world, line, keeps_table=as_stored)
        if place is None:
            return None
        load = partial(self.loading.load, self.kernels, self.options.metrics)
        return build_replica(group, place.mesh, self.store, self.kernels, self.options, load)

    def build(
        self, group: Collectives, mesh: Mesh, source: WeightSource, on_loaded: Callable[[], None]
    ) -> Replica:
        """Load this rank's part of a replica again. Collective over the replica."""
        replica = build_replica(group, mesh, source, self.kernels, self.options, on_loaded=on_loaded)
        self.loading.release()
        self.store.close()
        return replica


def rank_report(place: dict[str, Any], serving: Serving, metrics: Metrics, counts: RowCounts) -> dict[str, Any]:
    """Collect what a rank measured, as JSON values. Not collective."""
    return {
        "rank": serving.mail.rank,
        "host": socket.gethostname(),
        "place": place,
        "startup": STARTUP.to_json(),
        "seconds": dict(metrics.seconds),
        "kernels": serving.kernels.phase_seconds(),
        "counts": dict(metrics.counts),
        "peaks": metrics.peaks,
        "finish_reasons": dict(counts.finish_reasons),
        "errors": dict(counts.errors),
        "examples": counts.examples,
        "loading": serving.loading.report(),
        "bytes_read": {"store": serving.store.bytes_read, "stage": serving.store.bytes_from_stage,
                       "input": counts.input_bytes},
        "rows": {"finished": counts.rows, "cut_by_default": counts.cut_by_default, "kept": counts.kept},
        "tokens": {"prompt": counts.prompt_tokens, "output": counts.output_tokens, "resumed": counts.resumed_tokens},
    }


def place_of(replica: Replica) -> dict[str, Any]:
    """Where a rank stands in its replica, as JSON values. Not collective."""
    plan = replica.runner.stage.plan
    return {**dataclasses.asdict(replica.runner.pipeline.place), "share": len(plan.run) / plan.num_grains}
