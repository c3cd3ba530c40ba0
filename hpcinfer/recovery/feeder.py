"""The feeder: rows of dealt blocks become requests, finished rows become lines of a part file. On every leader.

A row that cannot be served becomes its error record here and never reaches the engine.
"""

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import NamedTuple

from hpcinfer.data.completion import Choice, completion_record
from hpcinfer.data.request import Prepared
from hpcinfer.engine.request import Request
from hpcinfer.recovery.dealing import Deal, DealClient, Dealer
from hpcinfer.recovery.rows import PrepareAhead, Refused, Row, RowSource
from hpcinfer.recovery.writer_thread import WriterThread
from hpcinfer.report.progress import Progress

_IDLE_S = 0.01
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
    output_tokens: int = 0


class _Open(NamedTuple):
    """A row in the engine."""

    prepared: Prepared
    deal: Deal


class Feeder:
    """Frontend of one replica over the job directory."""

    def __init__(
        self, source: RowSource, rows: PrepareAhead, writer: WriterThread, client: DealClient,
        dealer: Dealer | None = None, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self._source, self._rows, self._writer, self._client = source, rows, writer, client
        self._dealer, self._progress = dealer, progress  # on the claimant only
        self._backlog: deque[tuple[int, Deal]] = deque()
        self._open: dict[int, _Open] = {}
        self._num_left: Counter[int] = Counter()  # rows of a block that are not finished
        self.counts = RowCounts()

    def take(self, wanted: int) -> list[Request]:
        """Give up to `wanted` rows that are prepared, of the blocks that have come. Not collective."""
        self._turn(wanted)
        while self._backlog and self._rows.num_open < wanted + _NUM_AHEAD:
            self._rows.give(*self._backlog.popleft())
        requests: list[Request] = []
        while len(requests) < wanted and (row := self._rows.take()) is not None:
            request = self._open_row(row)
            if request is not None:
                requests.append(request)
        return requests

    def finish(self, row: int, choices: tuple[Choice, ...]) -> None:
        """Write the line of a finished row. Not collective."""
        prepared, deal = self._open.pop(row)
        preparer, name = self._source.preparer, prepared.request.model or self._source.model_name
        line = completion_record(prepared, choices, name, preparer.tokenizer)
        self.counts.finish_reasons.update(choice.finish_reason for choice in choices)
        if "max_tokens" not in prepared.request.options:
            self.counts.cut_by_default += sum(choice.finish_reason == "length" for choice in choices)
        self.counts.prompt_tokens += len(prepared.prompt_ids)
        self.counts.output_tokens += sum(len(choice.token_ids) for choice in choices)
        self._append(row, deal, line, is_error=False)

    def is_exhausted(self) -> bool:
        """Whether the whole job is complete. Not collective."""
        return self._client.is_ended and not self._backlog and not self._rows.num_open

    def is_stopping(self) -> bool:
        """Whether to end soon, with rows unfinished. Not collective."""
        return False

    def wait(self) -> None:
        """Have all lines made durable, since others may wait for them, and pass a moment. Not collective."""
        self._writer.flush()
        if self._dealer is not None:
            self._dealer.claims.look()
        self._rows.wait(_IDLE_S)

    def close(self) -> None:
        """Stay until every leader knows that the job is complete. Not collective."""
        if self._dealer is not None and self._progress is not None:
            self._dealer.close()
            self._progress.close(self._dealer.claims.num_done)

    def _turn(self, wanted: int) -> None:
        self._writer.check()
        num_coming = len(self._backlog) + self._rows.num_open
        if num_coming <= wanted:  # also when nothing is wanted yet: a block ahead of need
            self._client.ask(max(1, wanted - num_coming))
        if self._dealer is not None and self._progress is not None:
            self._dealer.serve()
            self._progress.update(self._dealer.claims.num_done)
        for deal in self._client.poll():
            self._num_left[deal.block] += len(deal.rows)
            self._backlog.extend((row, deal) for row in deal.rows)

    def _open_row(self, ready: Row) -> Request | None:
        row, deal, content = ready
        if isinstance(content, Refused):
            self.counts.errors[content.error.code] += 1
            self.counts.examples.setdefault(content.error.code, f"row {row}: {content.error.found}")
            self._append(row, deal, content.record, is_error=True)
            return None
        self._open[row] = _Open(content, deal)
        return Request(row, tuple(content.prompt_ids.tolist()), content.sampling, generation=deal.generation)

    def _append(self, row: int, deal: Deal, line: bytes, *, is_error: bool) -> None:
        self._writer.append(row, deal.generation, line, is_error=is_error)
        self.counts.rows += 1
        self._num_left[deal.block] -= 1
        if self._num_left[deal.block] == 0:
            del self._num_left[deal.block]
            self._writer.maybe_flush(_BLOCK_FLUSH_S)
