"""The runner: one batch through this rank's stage, and the sampling after the last one."""

from dataclasses import dataclass

from hpcinfer.engine.batch import Batch
from hpcinfer.engine.pipeline import Pipeline
from hpcinfer.engine.sampler import Sampler, encode_results
from hpcinfer.model.decoder import Stage
from hpcinfer.report.metrics import Metrics


@dataclass(frozen=True)
class Runner:
    """Runs batches in order; collective over the replica, stage by stage."""

    stage: Stage
    sampler: Sampler
    pipeline: Pipeline
    eos_ids: tuple[int, ...]
    metrics: Metrics

    def forward(self, batch: Batch) -> None:
        """Receive, compute the layers, and send on; after the last stage sample and tell the leader.

        Collective over tp; stages follow one another.
        """
        hidden = None
        place = self.pipeline.place
        if not place.is_first:
            with self.metrics.phase("pipeline"):
                hidden = self.pipeline.receive_hidden(batch.num_tokens)
        with self.metrics.phase("forward"):
            result = self.stage.forward(batch.step, hidden, self.pipeline.turn)
        if not place.is_last:
            with self.metrics.phase("pipeline"):
                self.pipeline.send_hidden(result)
        elif batch.rows:
            with self.metrics.phase("sampling"):
                results = self.sampler.sample(result, batch.rows, self.eos_ids)
            if place.is_sampler:
                self.pipeline.send_results(encode_results(results))
