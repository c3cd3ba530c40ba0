"""The runner: one batch through this rank's stage, and the sampling after the last one."""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from hpcinfer.engine.batch import Batch
from hpcinfer.engine.pipeline import Pipeline
from hpcinfer.engine.sampler import Sampler, Sampling
from hpcinfer.model.decoder import Stage
from hpcinfer.report.metrics import Metrics


class _Late(NamedTuple):
    """A batch whose results are to be waited for."""

    batch: Batch
    sampling: Sampling


@dataclass(frozen=True)
class Runner:
    """Runs batches in order; collective over the replica, stage by stage."""

    stage: Stage
    sampler: Sampler
    pipeline: Pipeline
    eos_ids: tuple[int, ...]
    metrics: Metrics
    _late: deque[_Late] = field(default_factory=deque, init=False)

    def forward(self, batch: Batch) -> None:
        """Receive, compute the layers, and send on; after the last stage sample, and tell the leader what is there.

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
                sampling = self.sampler.start(result, batch.rows, self.eos_ids)
                if sampling.is_late:
                    self._late.append(_Late(batch, sampling))
                else:
                    self._tell(sampling)

    def finish(self, batch: Batch | None) -> None:
        """Wait for a device to compute what is sampled from a batch, and tell the leader.

        Collective over tp of the last stage; nothing is to be done where results were there at once.
        """
        if self._late and self._late[0].batch is batch:
            sampling = self._late.popleft().sampling
            with self.metrics.phase("forward"):
                sampling.fetch.wait()
            with self.metrics.phase("sampling"):
                self._tell(sampling)

    def _tell(self, sampling: Sampling) -> None:
        results = sampling.finish()
        if self.pipeline.place.is_sampler:
            self.pipeline.send_results(results)
