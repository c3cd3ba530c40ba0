"""The frontend of a replica over a job directory: what comes in becomes requests, what is finished becomes lines."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest

from hpcinfer.config import SamplingParams
from hpcinfer.data.completion import Choice
from hpcinfer.data.request import Prepared, RowRequest
from hpcinfer.engine.request import Request
from hpcinfer.errors import JobDirectoryError, RequestError
from hpcinfer.recovery.dealing import Deal
from hpcinfer.recovery.feeder import Feeder, RowCounts
from hpcinfer.recovery.journal import PartWriter
from hpcinfer.recovery.rows import PrepareAhead, RowSource
from hpcinfer.recovery.witness import Witness
from hpcinfer.recovery.writer_thread import WriterThread

NUM_CHOICES = 1


class Desk:
    """Deals blocks one at a time, when asked; others are the claimant."""

    def __init__(self, deals):
        self._deals, self._is_asked = list(deals), False
        self.most_asked = 0
        self.num_asked, self.is_ended, self.is_stopped, self.held = 0, False, False, None

    def ask(self, num_rows):
        assert num_rows > 0
        self.most_asked = max(self.most_asked, num_rows)
        self._is_asked = True
        self.num_asked += 1

    def turn(self, held):
        self.held = held
        if not self._is_asked:
            return ()
        self._is_asked = False
        if self._deals:
            return (self._deals.pop(0),)
        self.is_ended = True
        return ()

    def look(self):
        pass


def prepare(row, line):
    if line.startswith(b"bad"):
        raise RequestError("invalid_value", "bad", param="prompt")
    sampling = SamplingParams(n=NUM_CHOICES)
    return Prepared(RowRequest(row, "completions", "text"), np.frombuffer(line, np.uint8), sampling)


@pytest.fixture
def feed(make_job, tmp_path):
    """Run a function with a feeder over 40 rows in blocks of 8, every seventh of them bad; gives the lines written."""

    def run(use, deals=5):
        paths, index = make_job(40, lambda row: f"bad {row}" if row % 7 == 0 else f"fine {row}")
        desk = Desk(Deal(block, 1, tuple(range(8 * block, 8 * block + 8))) for block in range(deals))
        preparer = SimpleNamespace(kind="text", prepare=prepare, tokenizer=None)
        with (tmp_path / "prompts.txt").open("rb") as file, PartWriter(paths, "a") as part:
            source = RowSource(file, index, preparer, "model")
            with WriterThread(part) as writer, PrepareAhead(source) as rows:
                use(Feeder(source, rows, writer, desk, RowCounts(), Witness(paths, "start")))
        return [json.loads(line) for line in paths.part_data("a").read_bytes().splitlines()]

    return run


def serve(feeder, slots=6):
    """Take and finish until there is nothing more; at most `slots` rows are open."""
    opened, end = [], time.monotonic() + 20
    while not (feeder.is_exhausted() and not opened) and time.monotonic() < end:
        taken = feeder.take(slots - len(opened))
        assert len(taken) <= slots - len(opened)
        opened += taken
        if opened:
            request = opened.pop(0)
            feeder.finish(request.row, (Choice(0, (1, 2), f"text {request.row}", "length"),))
        else:
            feeder.wait()


def test_each_row_of_each_block_has_one_line_and_is_counted(feed):
    feeders = []
    lines = feed(lambda feeder: (feeders.append(feeder), serve(feeder)))
    assert sorted(line["row"] for line in lines) == list(range(40))
    assert {line["row"] for line in lines if "error" in line} == {0, 7, 14, 21, 28, 35}
    assert all(line["text"] == f"text {line['row']}" for line in lines if "error" not in line)
    counts = feeders[0].counts
    assert (counts.rows, counts.errors, counts.output_tokens) == (40, {"invalid_value": 6}, 68)
    assert counts.examples == {"invalid_value": "row 0: bad"} and counts.cut_by_default == 34


def test_rows_of_many_choices_are_taken_as_their_choices_are_wanted(feed, monkeypatch):
    monkeypatch.setitem(globals(), "NUM_CHOICES", 4)
    sizes, asked = [], []

    def use(feeder):
        end = time.monotonic() + 20
        while sum(sizes) < 34 and time.monotonic() < end:
            sizes.append(len(feeder.take(6)))
            asked.append(feeder.desk.most_asked)
            feeder.desk.most_asked = 0
            feeder.wait()

    feed(use)
    first = next(i for i, size in enumerate(sizes) if size > 0)
    assert sum(sizes) == 34 and max(sizes) <= 2, "two rows have eight choices"
    assert max(asked[: first + 1]) == 6 and max(asked[first + 1 :]) <= 2


def test_requests_come_in_the_order_of_their_blocks(feed):
    taken = []

    def use(feeder):
        end = time.monotonic() + 20
        while len(taken) < 34 and time.monotonic() < end:
            taken.extend(request.row for request in feeder.take(3))
            feeder.wait()

    feed(use)
    assert taken == [row for row in range(40) if row % 7]


def test_rows_are_prepared_and_blocks_asked_for_ahead_of_need(feed):
    def use(feeder):
        for _ in range(3):
            assert feeder.take(0) == []
        assert feeder.desk.num_asked == 1 and feeder._rows.num_open == 8  # one block, and no more than that
        assert not feeder.is_exhausted()

    feed(use)


def test_failure_of_the_disk_ends_the_loop(feed):
    def use(feeder):
        feeder._writer._error = JobDirectoryError("finished lines cannot be stored")
        feeder.take(1)

    with pytest.raises(JobDirectoryError, match="cannot be stored"):
        feed(use)


# When ranks die.


def request_of(row, generation=1):
    return Request(row, tuple(f"fine {row}".encode()), SamplingParams(), ((7, 8),), generation)


def test_a_leader_tells_what_it_holds_and_that_what_it_finished_is_durable(feed, tmp_path):
    def use(feeder):
        while not feeder.held():
            taken = feeder.take(3)
            feeder.wait()
        assert feeder.held() == (Deal(0, 1, tuple(range(8))),)
        while len(taken) < 3:
            taken += feeder.take(3 - len(taken))
            feeder.wait()
        for request in taken:
            feeder.finish(request.row, (Choice(0, (1, 2), "text", "length"),))
        assert feeder.desk.held() == (Deal(0, 1, (4, 5, 6, 7)),)
        assert num_durable(tmp_path) == 4  # with the bad one

    feed(use)


def num_durable(folder):
    return sum((path.stat().st_size - 32) // 32 for path in folder.glob("*.job/parts/*.sidecar"))


def test_blocks_that_are_done_are_held_no_more(feed):
    def use(feeder):
        serve(feeder)
        assert feeder.held() == ()

    feed(use)


def test_a_new_leader_adopts_the_rows_of_the_dead_one(feed):
    adopted = [request_of(row, generation) for row, generation in ((9, 1), (10, 1), (20, 3))]
    block_of = []

    def use(feeder):
        block_of.extend(feeder._source.index.block_of_rows()[[9, 10, 20]].tolist())
        feeder.adopt(adopted)
        assert not feeder.is_exhausted()
        for deal in feeder.held():
            assert deal.rows == tuple(row for row, block in zip((9, 10, 20), block_of, strict=True)
                                      if block == deal.block)
            assert deal.generation == (3 if deal.rows == (20,) else 1)
        for request in adopted:
            feeder.finish(request.row, (Choice(0, (1,), f"text {request.row}", "length"),))
        assert feeder.held() == ()

    lines = feed(use, deals=0)
    assert [line["row"] for line in lines] == [9, 10, 20]


def test_rows_that_are_held_are_not_served_twice_when_their_block_is_dealt_again(feed):
    def use(feeder):
        feeder.adopt([request_of(8)])
        [held] = feeder.held()
        feeder.desk._deals = [Deal(held.block, 2, (8, 9, 10))]
        served, end = [], time.monotonic() + 20
        while len(served) < 2 and time.monotonic() < end:
            served += feeder.take(4)
            feeder.wait()
        assert [request.row for request in served] == [9, 10]
        assert [deal.rows for deal in feeder.held()] == [(8, 9, 10)] and feeder.take(4) == []

    feed(use, deals=0)
