"""What the journal says about each row, in two bytes: its highest attempt, and whether that ended in an error."""

import numpy as np

from hpcinfer.errors import JobDirectoryError
from hpcinfer.recovery.sidecar import IS_ERROR, JournalReader, PartEntries


class RowStates:
    """State of every row. An error counts as finished unless a later attempt was opened to compute it again."""

    def __init__(self, num_rows: int, attempt: int) -> None:
        self._attempt = attempt
        self._scores = np.full(num_rows, -1, np.int16)  # 2 * attempt + (1 if not an error); -1: nothing yet

    def update(self, part_entries: PartEntries) -> np.ndarray:
        """Take in journal entries; returns the rows that are finished now and were not before. Not collective."""
        part, entries = part_entries
        if len(entries) and entries["row"].max() >= len(self._scores):
            raise JobDirectoryError(f"part {part} has row {entries['row'].max()}",
                                    expected=f"rows below {len(self._scores)}",
                                    hint="the part belongs to another job; move it away")
        rows = np.unique(entries["row"])
        open_rows = rows[~self.are_finished(rows)]
        scores = 2 * entries["attempt"].astype(np.int16) + ((entries["flags"] & IS_ERROR) == 0)
        np.maximum.at(self._scores, entries["row"], scores)
        return open_rows[self.are_finished(open_rows)]

    def read_all(self, reader: JournalReader) -> None:
        """Take in all that is new in the journal. Not collective."""
        for part_entries in reader.read():
            self.update(part_entries)

    def are_finished(self, rows: np.ndarray | slice) -> np.ndarray:
        """Tell which of these rows need no more work. Not collective."""
        scores = self._scores[rows]
        return (scores >= 2 * self._attempt) | ((scores > 0) & (scores & 1 == 1))

    @property
    def num_done(self) -> int:
        """Rows with a line, errors of earlier attempts too."""
        return int((self._scores >= 0).sum())

    @property
    def num_failed(self) -> int:
        """Rows whose line is an error record."""
        return int(((self._scores >= 0) & (self._scores & 1 == 0)).sum())

    @property
    def num_unfinished(self) -> int:
        """Rows that need work in this attempt."""
        return len(self._scores) - int(self.are_finished(slice(None)).sum())
