"""Serving a job: what leaders and followers do between the loaded model and the complete journal."""

from __future__ import annotations

import dataclasses
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpcinfer.data.prepare import Preparer
from hpcinfer.engine.leader import Leader
from hpcinfer.engine.outputs import Outputs
from hpcinfer.engine.replica import Replica
from hpcinfer.recovery.claims import Claimer
from hpcinfer.recovery.dealing import ClaimAhead, DealClient, Dealer
from hpcinfer.recovery.feeder import Feeder, RowCounts
from hpcinfer.recovery.job import Job
from hpcinfer.recovery.journal import PartWriter
from hpcinfer.recovery.leases import Lease, incarnation_name
from hpcinfer.recovery.rows import PrepareAhead, RowSource
from hpcinfer.recovery.writer_thread import WriterThread
from hpcinfer.report.progress import Progress

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives


@dataclass(frozen=True)
class Serving:
    """What a leader serves, and with what."""

    job: Job
    preparer: Preparer
    replica: Replica
    model_name: str  # in records whose request does not name a model
    lease_timeout_s: float


def serve_leader(world: Collectives, serving: Serving, num_replicas: int) -> dict[str, Any]:
    """Feed one replica until the whole job is complete; world rank 0 claims and deals for all.

    Collective over the replica, with `serve_follower` on its other ranks.

    Returns:
        The report of this rank.
    """
    job, replica = serving.job, serving.replica
    with ExitStack() as stack:
        lease, dealer, progress = None, None, None
        if world.rank == 0:
            lease = Lease(job.paths.leases, serving.lease_timeout_s).start()
            claimer = Claimer(job.paths, job.index, lease, job.attempt)
            progress = Progress(job.index.num_rows, claimer.num_done)
            dealer = Dealer(world, ClaimAhead(claimer, num_replicas), num_replicas)
        part = stack.enter_context(PartWriter(job.paths, incarnation_name(), job.attempt))
        writer = stack.enter_context(WriterThread(part))
        file = stack.enter_context(job.input_path.open("rb"))
        source = RowSource(file, job.index, serving.preparer, serving.model_name)
        rows = stack.enter_context(PrepareAhead(source))
        feeder = Feeder(source, rows, writer, DealClient(world), dealer, progress)
        outputs = Outputs(serving.preparer.tokenizer, replica.runner.eos_ids)
        replica.engine.run(Leader(replica.scheduler, outputs, feeder, replica.runner))
        feeder.close()
    if lease is not None:
        lease.close()  # not after an error: the other replicas still work, until all are ended
    return rank_report(replica, feeder.counts)


def serve_follower(replica: Replica) -> dict[str, Any]:
    """Follow the leader's records until the last one.

    Collective over the replica.

    Returns:
        The report of this rank.
    """
    replica.engine.run(None)
    return rank_report(replica, RowCounts())


def rank_report(replica: Replica, counts: RowCounts) -> dict[str, Any]:
    """Collect what a rank measured, as JSON values. Not collective."""
    metrics = replica.runner.metrics
    return {
        "host": socket.gethostname(),
        "place": dataclasses.asdict(replica.runner.pipeline.place),
        "seconds": dict(metrics.seconds),
        "kernels": replica.runner.kernels.phase_seconds(),
        "counts": dict(metrics.counts),
        "peaks": metrics.peaks,
        "finish_reasons": dict(counts.finish_reasons),
        "errors": dict(counts.errors),
        "examples": counts.examples,
        "rows": {"finished": counts.rows, "cut_by_default": counts.cut_by_default},
        "tokens": {"prompt": counts.prompt_tokens, "output": counts.output_tokens},
    }
