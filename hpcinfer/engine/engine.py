"""THE loop: every rank of a replica takes the same decisions from the same step records.

    record (results of micro-batch k - pp, new requests) → commit → schedule → forward → sample

With pp stages, pp micro-batches are in flight: stage s computes micro-batch k while stage s + 1 computes k - 1. More of
them (`--micro-batches`) keep stages busy while hidden states travel; the record then holds the results of an older one.
A device computes behind the loop: results of a micro-batch are waited for when the record that holds them is due, so
that with two of them the next one is scheduled and enqueued while this one runs. It may hold the same sequences: the
device keeps the ids that it samples.
"""

from collections import deque
from collections.abc import Callable

from hpcinfer.agree import where_am_i
from hpcinfer.engine.batch import Batch, build_batch
from hpcinfer.engine.leader import Leader
from hpcinfer.engine.record import NO_TOKEN, StepRecord
from hpcinfer.engine.runner import Runner
from hpcinfer.engine.scheduler import Scheduler
from hpcinfer.report.metrics import Metrics


class Engine:
    """One rank's part of a replica."""

    def __init__(self, scheduler: Scheduler, runner: Runner, metrics: Metrics, *, debug_lockstep: bool = False) -> None:
        self._scheduler, self._runner, self._metrics = scheduler, runner, metrics
        self._pipeline = runner.pipeline
        self._in_flight: deque[Batch | None] = deque([None] * scheduler.limits.num_micro_batches)
        self._debug_lockstep = debug_lockstep
        self._step = 0
        self.num_records = 0  # that were applied
        self.is_stopped = False  # before its end, by the leader's frontend

    def run(self, leader: Leader | None, each_step: Callable[[], None] | None = None) -> None:
        """Serve requests until there are no more, or until the leader's frontend stops.

        Collective over the replica.

        Args:
            leader: on the leader; None on all other ranks.
            each_step: called between two steps.
        """
        while not (record := self._exchange(leader)).is_last:
            self._apply(record, leader)
            with self._metrics.phase("scheduling"):
                works = self._scheduler.schedule(record.num_tokens)
                before = self._in_flight[-1] if self._scheduler.limits.goes_ahead else None
                batch = build_batch(works, self._scheduler.blocks.block_size, before) if works else None
            is_idle = not any(self._in_flight)
            self._in_flight.append(batch)
            self._metrics.peak("micro_batches", sum(b is not None for b in self._in_flight))
            if batch is not None:
                self._runner.forward(batch)
            self._step += 1
            if record.token_ids:
                self._note_step(record, batch)
            elif is_idle:
                self._metrics.timeline.pause()
            if each_step is not None:
                each_step()
        self.is_stopped = record.num_tokens == 0
        self._pipeline.flush()

    def _note_step(self, record: StepRecord, batch: Batch | None) -> None:
        num_given = len(record.token_ids) - record.token_ids.count(NO_TOKEN)
        sequences, tokens = (len(batch.works), batch.num_tokens) if batch is not None else (0, 0)
        blocks = self._scheduler.blocks
        self._metrics.timeline.step(num_given, sequences, tokens, blocks.num_blocks - blocks.num_free)

    def _exchange(self, leader: Leader | None) -> StepRecord:
        self._runner.finish(self._in_flight[0])
        digest = self._scheduler.digest() if self._debug_lockstep else bytes(8)
        if leader is not None:
            record = leader.write(self._step, self._in_flight, digest)
            if self._pipeline.replica.size > 1:
                self._pipeline.send_record(record.to_bytes())
            return record
        with self._metrics.phase("waiting for the leader"):
            record = StepRecord.from_bytes(self._pipeline.receive_record())
        who = where_am_i(self._pipeline.replica)
        assert record.step == self._step, f"{who}: {record.step = } {self._step = }"
        assert record.digest == digest, f"{who}: the schedule differs from the leader's at step {self._step}"
        return record

    def _apply(self, record: StepRecord, leader: Leader | None) -> None:
        with self._metrics.phase("scheduling"):
            oldest = self._in_flight.popleft()
            works = oldest.works if oldest else []
            for work, token_id, finish in zip(works, record.token_ids, record.finishes, strict=True):
                self._scheduler.commit(work, None if token_id == NO_TOKEN else token_id, finish)
            self.num_records += 1
            for request in record.requests:
                sequences = self._scheduler.add(request)
                if leader is not None:
                    leader.outputs.open(sequences)
