from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest

from hpcinfer.comm.operations import Operations
from hpcinfer.comm.serial import SerialGroup
from hpcinfer.config import SamplingParams
from hpcinfer.engine.batch import build_batch
from hpcinfer.engine.block_manager import BlockManager
from hpcinfer.engine.frontend import ListFrontend
from hpcinfer.engine.leader import Leader
from hpcinfer.engine.outputs import Outputs
from hpcinfer.engine.pipeline import Pipeline, Place
from hpcinfer.engine.record import NO_TOKEN
from hpcinfer.engine.request import Request
from hpcinfer.engine.sampler import RowResult
from hpcinfer.engine.scheduler import Limits, Scheduler
from hpcinfer.engine.sequence import Finish
from hpcinfer.report.metrics import Metrics

EOS = 1


class LateFrontend(ListFrontend):
    """Requests that come only after some waiting."""

    def __init__(self, requests, waits):
        super().__init__(requests)
        self.waits_left = waits

    def take(self, wanted):
        return super().take(wanted) if self.waits_left == 0 else []

    def is_exhausted(self):
        return self.waits_left == 0 and super().is_exhausted()

    def wait(self):
        assert self.waits_left > 0, "waited though there was something to do"
        self.waits_left -= 1


class Bench:
    """A leader whose model is the test."""

    def __init__(self, tokenizer, frontend, limits):
        self.scheduler = Scheduler(limits, BlockManager(64, 4), Metrics())
        place, group = Place(1, 1, 0, 0), Operations(SerialGroup())
        self.pipeline = Pipeline(group, place, 1, lambda tokens: np.empty((tokens, 1), np.float32))
        self.frontend = frontend
        runner = SimpleNamespace(pipeline=self.pipeline, metrics=Metrics())
        self.leader = Leader(self.scheduler, Outputs(tokenizer, (EOS,)), frontend, runner)
        self.in_flight = deque([None])

    def step(self, tokens=()):
        """Write a record, apply it, and run the next batch, which samples these tokens."""
        record = self.leader.write(0, self.in_flight, bytes(8))
        oldest = self.in_flight.popleft()
        works = oldest.works if oldest else []
        for work, token_id, finish in zip(works, record.token_ids, record.finishes, strict=True):
            self.scheduler.commit(work, None if token_id == NO_TOKEN else token_id, finish)
        for request in record.requests:
            self.leader.outputs.open(self.scheduler.add(request))
        works = self.scheduler.schedule()
        self.in_flight.append(build_batch(works, 4) if works else None)
        if works and self.in_flight[0].rows:
            self.pipeline.send_results([RowResult(token, None) for token in tokens])
        return record


def requests(count, length=3, **params):
    return [Request(row, tuple(range(length)), SamplingParams(**{"max_tokens": 2, **params})) for row in range(count)]


@pytest.fixture
def bench(tokenizer):
    return lambda frontend, limits=Limits(2, 64): Bench(tokenizer, frontend, limits)  # noqa: B008


def test_a_row_from_admission_to_its_end(bench):
    made = bench(ListFrontend(requests(1)))
    first = made.step([40])
    assert [r.row for r in first.requests] == [0] and not first.is_last and first.token_ids == ()
    second = made.step([41])
    assert (second.token_ids, second.finishes, second.is_last) == ((40,), (Finish.NONE,), False)
    third = made.step()
    assert (third.token_ids, third.finishes, third.is_last) == ((41,), (Finish.LENGTH,), False)
    assert [choice.token_ids for choice in made.frontend.finished[0]] == [(40, 41)]
    assert made.step().is_last


def test_no_requests_end_at_once(bench):
    assert bench(ListFrontend([])).step().is_last


def test_chunks_give_no_token(bench):
    made = bench(ListFrontend(requests(1, length=10)), Limits(2, 6))
    made.step()
    record = made.step([40])
    assert record.token_ids == (NO_TOKEN,) and record.finishes == (Finish.NONE,)
    assert made.step([41]).token_ids == (40,)


@pytest.mark.parametrize("waits", [1, 5])
def test_leader_waits_only_while_there_is_nothing_to_compute(bench, waits):
    made = bench(LateFrontend(requests(1, max_tokens=1), waits))
    assert [r.row for r in made.step([40]).requests] == [0] and made.frontend.waits_left == 0
    assert made.step().finishes == (Finish.LENGTH,) and made.step().is_last


def test_last_results_are_delivered_before_the_end(bench):
    """Nothing is left to do, but a row has ended: the others must hear of it."""
    made = bench(ListFrontend(requests(1, max_tokens=1)))
    made.step([40])
    record = made.step()
    assert record.finishes == (Finish.LENGTH,) and not record.is_last


def test_no_more_rows_are_taken_than_soon_can_run(bench):
    made = bench(ListFrontend(requests(100)), Limits(4, 64))
    taken = len(made.step([40] * 4).requests)
    assert 4 < taken <= 8
    assert len(made.step([EOS, EOS, 41, 41]).requests) == 0  # nothing has ended yet
    assert len(made.step([42] * 4).requests) == 4


def test_rows_with_many_choices_end_once(bench):
    made = bench(ListFrontend(requests(2, n=3, max_tokens=1)), Limits(8, 64))
    made.step([40, 41, 42, 50, 51, 52])
    made.step()
    assert {row: [c.token_ids for c in choices] for row, choices in made.frontend.finished.items()} == {
        0: [(40,), (41,), (42,)], 1: [(50,), (51,), (52,)],
    }  # fmt: skip
