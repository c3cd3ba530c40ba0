"""The feeder: rows of dealt blocks become requests, finished rows become lines of a part file. On every leader.

A row that cannot be served becomes its error record here and never reaches the engine.
"""

import logging
import os
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from hpcinfer.data.completion import Choice, completion_record, error_record
from hpcinfer.data.prepare import Preparer
from hpcinfer.data.request import Prepared
from hpcinfer.engine.request import Request
from hpcinfer.errors import JobDirectoryError, RequestError
from hpcinfer.recovery.dealing import Deal, DealClient, Dealer
from hpcinfer.recovery.index import Index
from hpcinfer.recovery.journal import PartWriter
from hpcinfer.recovery.scan import content_hash
from hpcinfer.report.progress import Progress

log = logging.getLogger(__name__)

_IDLE_S = 0.01
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


@dataclass(frozen=True)
class RowSource:
    """Where rows are read and how they are prepared and answered."""

    file: BinaryIO  # the plain input
    index: Index
    preparer: Preparer
    model_name: str

    def read(self, row: int) -> bytes:
        """Read one row.

        Raises:
            JobDirectoryError: it is not what it was when the index was built.
        """
        offset, length = self.index.span(row)
        line = os.pread(self.file.fileno(), length, offset)
        if content_hash(line) != self.index.content_hash(row):
            raise JobDirectoryError(
                f"row {row} of the input has changed",
                expected="the same input as when the job started",
                where=f"{self.file.name}, byte {offset}",
                hint="restore the input, or start a new job with another --output",
            )
        return line

    def prepare(self, row: int, line: bytes) -> Prepared:
        """Prepare one row; a bug of ours costs that row, not the job.

        Raises:
            RequestError: a row that cannot be served.
        """
        try:
            return self.preparer.prepare(row, line)
        except RequestError:
            raise
        except Exception as error:
            log.exception("row %d: this is a bug of hpcinfer; the row becomes an error record", row)
            raise RequestError("internal_error", f"{type(error).__name__} while the row was prepared") from error


class Feeder:
    """Frontend of one replica over the job directory."""

    def __init__(
        self, source: RowSource, writer: PartWriter, client: DealClient, dealer: Dealer | None = None,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self._source, self._writer, self._client = source, writer, client
        self._dealer, self._progress = dealer, progress  # on the claimant only
        self._backlog: deque[tuple[int, Deal]] = deque()
        self._open: dict[int, _Open] = {}
        self._num_left: Counter[int] = Counter()  # rows of a block that are not finished
        self.counts = RowCounts()

    def take(self, wanted: int) -> list[Request]:
        """Prepare up to `wanted` rows of the blocks that have come. Not collective."""
        self._turn(wanted)
        requests: list[Request] = []
        while self._backlog and len(requests) < wanted:
            row, deal = self._backlog.popleft()
            request = self._prepare(row, deal)
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
        return self._client.is_ended and not self._backlog

    def wait(self) -> None:
        """Make all lines durable, since others may wait for them, and pass a moment. Not collective."""
        self._writer.flush()
        time.sleep(_IDLE_S)

    def close(self) -> None:
        """Stay until every leader knows that the job is complete. Not collective."""
        if self._dealer is not None and self._progress is not None:
            self._dealer.close()
            self._progress.close(self._dealer.claims.num_done)

    def _turn(self, wanted: int) -> None:
        self._writer.maybe_flush()
        if len(self._backlog) <= wanted:  # also when nothing is wanted yet: a block ahead of need
            self._client.ask()
        if self._dealer is not None and self._progress is not None:
            self._dealer.serve()
            self._progress.update(self._dealer.claims.num_done)
        deal = self._client.poll()
        if deal is not None:
            self._num_left[deal.block] += len(deal.rows)
            self._backlog.extend((row, deal) for row in deal.rows)

    def _prepare(self, row: int, deal: Deal) -> Request | None:
        line = self._source.read(row)
        try:
            prepared = self._source.prepare(row, line)
        except RequestError as error:
            self.counts.errors[error.code] += 1
            self.counts.examples.setdefault(error.code, f"row {row}: {error.found}")
            self._append(row, deal, error_record(row, line, error, self._source.preparer.kind), is_error=True)
            return None
        self._open[row] = _Open(prepared, deal)
        return Request(row, tuple(prepared.prompt_ids.tolist()), prepared.sampling)

    def _append(self, row: int, deal: Deal, line: bytes, *, is_error: bool) -> None:
        self._writer.append(row, deal.generation, line, is_error=is_error)
        self.counts.rows += 1
        self._num_left[deal.block] -= 1
        if self._num_left[deal.block] == 0:
            del self._num_left[deal.block]
            self._writer.maybe_flush(interval_s=_BLOCK_FLUSH_S)
