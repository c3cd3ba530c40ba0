"""What only the leader does: requests in, texts and stop strings, finished rows out, the step record."""

import time
from collections import deque
from collections.abc import Callable

from hpcinfer.engine.batch import Batch
from hpcinfer.engine.frontend import Frontend
from hpcinfer.engine.outputs import Outputs
from hpcinfer.engine.record import NO_TOKEN, UNBOUNDED, StepRecord
from hpcinfer.engine.request import Request
from hpcinfer.engine.runner import Runner
from hpcinfer.engine.sampler import RowResult
from hpcinfer.engine.scheduler import Scheduler, Work
from hpcinfer.engine.sequence import Finish
from hpcinfer.report.metrics import IDLE

_FIRST_TOKENS = 64


class Leader:
    """Writes the step records of one replica."""

    def __init__(
        self, scheduler: Scheduler, outputs: Outputs, frontend: Frontend, runner: Runner,
        *, while_idle: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """Begin.

        Args:
            scheduler: of the replica.
            outputs: of its sequences.
            frontend: the world outside.
            runner: of this rank.
            while_idle: called again and again while there is nothing to compute.
        """
        self._while_idle = while_idle
        self._scheduler, self.outputs, self._frontend = scheduler, outputs, frontend
        self._pipeline, self._metrics = runner.pipeline, runner.metrics
        self._resumed: list[Request] = []
        self._is_resumed = False
        self.first_token_time: float | None = None  # seconds since the epoch; for reports

    def resume(self, requests: list[Request]) -> None:
        """Begin with these, whatever the limits: an earlier engine has admitted them."""
        self._is_resumed = bool(requests)
        self._resumed = sorted(requests, key=lambda request: len(request.prompt_ids) + sum(map(len, request.resumed)))

    def write(self, step: int, in_flight: deque[Batch | None], digest: bytes) -> StepRecord:
        """Collect the results of the oldest micro-batch and what is new."""
        oldest = in_flight[0]
        verdicts = self._verdicts(oldest) if oldest is not None else []
        num_ending = sum(finish is not Finish.NONE for _, finish in verdicts)
        requests = self._next(num_ending)
        has_work = bool(requests) or self._scheduler.num_live > num_ending
        is_stopping = self._frontend.is_stopping()
        return StepRecord(
            step, tuple(token for token, _ in verdicts), tuple(finish for _, finish in verdicts), tuple(requests),
            is_last=not requests and not any(in_flight) if is_stopping else not has_work and not verdicts,
            num_tokens=0 if is_stopping else self._num_tokens(), digest=digest,
        )  # fmt: skip

    def _next(self, num_ending: int) -> list[Request]:
        """New requests; waits for some if there is nothing else to do."""
        with self._metrics.phase("input and output"):
            requests = self._take(num_ending)
        if requests or self._scheduler.num_live > num_ending:
            return requests
        with self._metrics.phase(IDLE):
            while not (requests or self._frontend.is_exhausted() or self._frontend.is_stopping()):
                self._frontend.wait()
                if self._while_idle is not None:
                    self._while_idle()
                requests = self._take(num_ending)
        return requests

    def _num_tokens(self) -> int:
        """Tokens of the next batch: few until a resumed sequence goes on, so that this is soon."""
        return _FIRST_TOKENS if self._is_resumed and self.first_token_time is None else UNBOUNDED

    def _take(self, num_ending: int) -> list[Request]:
        if self._resumed:
            resumed, self._resumed = self._resumed, []
            return resumed
        if self._frontend.is_stopping():
            return []
        slots = self._scheduler.limits.max_running
        queue = slots + max(1, slots // 8)  # a few wait, so that a slot is never empty; the rest is for other replicas
        return self._frontend.take(max(0, queue - self._scheduler.num_live + num_ending))

    def _verdicts(self, batch: Batch) -> list[tuple[int, Finish]]:
        results: list[RowResult] = []
        if batch.rows:
            with self._metrics.phase("waiting for results"):
                results = self._pipeline.receive_results(len(batch.rows))
        with self._metrics.phase("input and output"):
            verdicts, start = [], 0
            for work in batch.works:
                stop = start + work.num_rows
                verdicts.append(self._verdict(work, results[start:stop]))
                start = stop
            return verdicts

    def _verdict(self, work: Work, results: list[RowResult]) -> tuple[int, Finish]:
        if work.sequence.is_finished:  # by the work before
            return NO_TOKEN, Finish.NONE
        finish = self.outputs.extend(work, results)
        token_id = results[-1].token_id if work.samples else NO_TOKEN
        if self.first_token_time is None and work.samples:
            self.first_token_time = time.time()
        if finish is not Finish.NONE and (choices := self.outputs.close(work.sequence, finish)):
            self._frontend.finish(work.sequence.request.row, choices)
        return token_id, finish
