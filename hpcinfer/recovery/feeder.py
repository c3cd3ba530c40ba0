"""The feeder: rows of dealt blocks become requests, finished rows become lines of a part file. On every leader.

A row that cannot be served becomes its error record here and never reaches the engine.
"""

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import NamedTuple

from hpcinfer.comm.waiting import is_working_meanwhile, turn_meanwhile
from hpcinfer.config import SamplingParams
from hpcinfer.data.completion import Choice, completion_record
from hpcinfer.data.request import Prepared
from hpcinfer.engine.request import Request
from hpcinfer.recovery.dealing import Deal
from hpcinfer.recovery.deaths import poison_error
from hpcinfer.recovery.desk import Desk
from hpcinfer.recovery.rows import PrepareAhead, Refused, Row, RowSource
from hpcinfer.recovery.snapshots import Outputs, Unfinished
from hpcinfer.recovery.witness import Witness
from hpcinfer.recovery.writer_thread import WriterThread

_IDLE_S, _SHORT_S = 0.01, 0.001
_NUM_AHEAD = 16  # rows that are prepared before they are wanted
_BLOCK_FLUSH_S = 1.0  # a finished block is made durable, small ones together


@dataclass
class RowCounts:
    """What became of the rows that this leader finished."""

    finish_reasons: Counter[str] = field(default_factory=Counter)  # by choice
    errors: Counter[str] = field(default_factory=Counter)  # by code
    examples: dict[str, str] = field(default_factory=dict)  # by code: the first row and its message
    cut_by_default: int = 0  # choices that ended at a max_tokens that their row did not ask for
    rows: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0  # without those of an earlier start
    resumed_tokens: int = 0  # output tokens that rows had when they were opened
    kept: int = 0  # sequences that were stopped, and will go on where they are
    input_bytes: int = 0  # of the rows that were read


class _Open(NamedTuple):
    """A row in the engine."""

    prepared: Prepared
    deal: Deal
    num_resumed: int = 0  # output tokens of an earlier start


@dataclass(frozen=True)
class _Left:
    """Rows of a block that are not finished."""

    generation: int
    rows: set[int] = field(default_factory=set)


class Feeder:
    """Frontend of one replica over the job directory."""

    def __init__(
        self, source: RowSource, rows: PrepareAhead, writer: WriterThread, desk: Desk, counts: RowCounts,
        witness: Witness,
    ) -> None:  # fmt: skip
        self._source, self._rows, self._writer, self.desk = source, rows, writer, desk
        self._backlog: deque[tuple[int, Deal]] = deque()
        self._open: dict[int, _Open] = {}
        self._left: dict[int, _Left] = {}  # by block
        self._witness = witness
        self._apart: deque[Row] = deque()  # rows that wait until they can be computed alone
        self._is_alone = False  # such a row is in the engine
        self._num_choices = 1  # of the latest row
        self.counts = counts

    def adopt(self, requests: list[Request]) -> None:
        """Take over rows that are in the engine already, from a leader that has died. Not collective."""
        block_of = self._source.index.block_of_rows() if requests else ()
        for request in requests:
            prepared = self._source.prepare(request.row)
            assert isinstance(prepared, Prepared), f"{request.row = } was served and is refused now"
            deal = Deal(int(block_of[request.row]), request.generation, (request.row,))
            self._open[request.row] = _Open(prepared, deal)
            self._left.setdefault(deal.block, _Left(deal.generation)).rows.add(request.row)

    def set_apart(self, requests: list[Request]) -> list[Request]:
        """Hold back rows in the engine with which ranks have died; returns those to go on with. Not collective."""
        suspects = [request for request in requests if self._witness.must_be_alone(request.row)]
        for request in suspects:
            prepared, deal, _ = self._open.pop(request.row)
            self._witness.closed(request.row)
            self._apart.append(Row(request.row, deal, prepared, request.resumed))
        self._is_alone = False
        return [request for request in requests if request.row in self._open]

    def held(self) -> tuple[Deal, ...]:
        """Rows that this leader works on; all that it has finished is durable when this returns. Not collective."""
        self._writer.flush_now()
        return tuple(Deal(block, left.generation, tuple(sorted(left.rows))) for block, left in self._left.items())

    def take(self, wanted: int) -> list[Request]:
        """Give rows that are prepared, of the blocks that have come, until they have `wanted` choices. Not collective.

        Rows that are to come are thought to have as many choices as the last one.
        """
        wanted_rows = -(-wanted // self._num_choices)
        self._turn(wanted_rows)
        while self._backlog and self._rows.num_open < wanted_rows + _NUM_AHEAD:
            self._rows.give(*self._backlog.popleft())
        requests: list[Request] = []
        while wanted > 0 and not self._is_alone and (row := self._rows.take()) is not None:
            if self._witness.must_be_alone(row.row):
                self._apart.append(row)
            elif (request := self._open_row(row)) is not None:
                requests.append(request)
                self._num_choices = request.sampling.n
                wanted -= self._num_choices
        return requests or self._take_apart()

    def _take_apart(self) -> list[Request]:
        """Give a row that must be alone once there is nothing else to do, and nothing more until it is finished."""
        if not self._apart or self._open or self._backlog or self._rows.num_open:
            return []
        request = self._open_row(self._apart.popleft())
        self._is_alone = request is not None
        return [request] if request is not None else []

    def finish(self, row: int, choices: tuple[Choice, ...]) -> None:
        """Write the line of a finished row. Not collective."""
        prepared, deal, num_resumed = self._open.pop(row)
        self._witness.closed(row)
        self._is_alone = False
        preparer, name = self._source.preparer, prepared.request.model or self._source.model_name
        line = completion_record(prepared, choices, name, preparer.tokenizer)
        self.counts.finish_reasons.update(choice.finish_reason for choice in choices)
        if "max_tokens" not in prepared.request.options:
            self.counts.cut_by_default += sum(choice.finish_reason == "length" for choice in choices)
        self.counts.prompt_tokens += len(prepared.prompt_ids)
        self.counts.output_tokens += sum(len(choice.token_ids) for choice in choices) - num_resumed
        self._append(row, deal, line, is_error=False)

    def is_exhausted(self) -> bool:
        """Whether the whole job is complete. Not collective."""
        return self.desk.is_ended and not self._backlog and not self._rows.num_open and not self._apart

    def is_stopping(self) -> bool:
        """Whether to end soon, with rows unfinished. Not collective."""
        return self.desk.is_stopping()

    def keep(self, requests: list[Request]) -> None:
        """Keep rows that are stopped in the middle, while those that are finished are made durable. Not collective."""
        self._writer.flush()
        if self._source.snapshots is not None:
            rows = [Unfinished(each.row, self._open[each.row].deal.block, each.resumed) for each in requests]
            self.counts.kept = self._source.snapshots.save(rows).num_sequences

    def wait(self) -> None:
        """Have all lines made durable, since others may wait for them, and pass a moment. Not collective."""
        self._writer.flush()
        self.desk.look()
        turn_meanwhile()
        self._rows.wait(_SHORT_S if is_working_meanwhile() else _IDLE_S)

    def _turn(self, wanted: int) -> None:
        self._writer.check()
        num_coming = len(self._backlog) + self._rows.num_open
        if num_coming <= wanted:  # also when nothing is wanted yet: a block ahead of need
            self.desk.ask(max(1, wanted - num_coming))
        for deal in self.desk.turn(self.held):
            left = self._left.setdefault(deal.block, _Left(deal.generation))
            if deal.generation > 1:  # its last owner has died
                self._witness.refresh()
            self._backlog.extend((row, deal) for row in deal.rows if row not in left.rows)
            left.rows.update(deal.rows)

    def _open_row(self, ready: Row) -> Request | None:
        row, deal, content, resumed = ready
        self.counts.input_bytes += self._source.index.span(row).length
        if self._witness.is_poison(row):
            content = self._source.refuse(row, poison_error())
        if isinstance(content, Refused):
            self.counts.errors[content.error.code] += 1
            self.counts.examples.setdefault(content.error.code, f"row {row}: {content.error.found}")
            self._append(row, deal, content.record, is_error=True)
            return None
        resumed = resumed if _fits(resumed, content.sampling) else ()
        num_resumed = sum(map(len, resumed))
        self.counts.resumed_tokens += num_resumed
        self._open[row] = _Open(content, deal, num_resumed)
        self._witness.opened(row)
        return Request(row, tuple(content.prompt_ids.tolist()), content.sampling, resumed, deal.generation)

    def _append(self, row: int, deal: Deal, line: bytes, *, is_error: bool) -> None:
        self._writer.append(row, deal.generation, line, is_error=is_error)
        self.counts.rows += 1
        left = self._left[deal.block].rows
        left.discard(row)
        if not left:
            del self._left[deal.block]
            self._writer.maybe_flush(_BLOCK_FLUSH_S)


def _fits(resumed: Outputs, sampling: SamplingParams) -> bool:
    """Whether a row that asks for this can go on there: each choice is there, none at its end, no score is missing."""
    is_open = all(len(ids) < sampling.max_tokens for ids in resumed)
    return len(resumed) == sampling.n and is_open and sampling.logprobs is None
