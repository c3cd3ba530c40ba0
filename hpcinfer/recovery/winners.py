"""For each row of a range the one line that counts: highest attempt, then lowest generation, then first part."""

import numpy as np

from hpcinfer.recovery.sidecar import ENTRY, IS_ERROR, JournalReader, PartEntries
from hpcinfer.recovery.states import RowStates


class Winners:
    """Journal entries of the lines that count, for the rows of a range; 38 bytes a row."""

    def __init__(self, rows: range, attempt: int) -> None:
        """Begin with no line.

        Args:
            attempt: the current one; errors of earlier attempts are unfinished rows.
        """
        self.rows, self.attempt = rows, attempt
        self._states = RowStates(len(rows), attempt)  # of the rows as if the range began at 0
        self.entries = np.zeros(len(rows), ENTRY)  # length 0: no line yet
        self.part_ids = np.zeros(len(rows), np.uint32)  # into parts
        self.parts: list[str] = []
        self.num_overlaps = 0  # lines written again with the same bytes
        self.num_conflicts = 0  # lines written again with other bytes: a bug or a broken machine

    def read(self, reader: JournalReader) -> None:
        """Take in all that is new in the journal. Not collective."""
        for part_entries in reader.read():
            self.add(part_entries)

    @property
    def num_done(self) -> int:
        """Rows with a line."""
        return int((self.entries["length"] > 0).sum())

    @property
    def num_failed(self) -> int:
        """Rows whose line is an error record."""
        return int(((self.entries["flags"] & IS_ERROR) != 0).sum())

    @property
    def num_unfinished(self) -> int:
        """Rows that need work in the current attempt, with a line or without."""
        return self._states.num_unfinished

    @property
    def size_bytes(self) -> int:
        """Bytes of all lines."""
        return int(self.entries["length"].sum(dtype=np.int64))

    def add(self, part_entries: PartEntries) -> None:
        """Let entries of one part compete. Not collective."""
        part, entries = part_entries
        if not self.parts or self.parts[-1] != part:
            self.parts.append(part)
        entries = entries[(entries["row"] >= self.rows.start) & (entries["row"] < self.rows.stop)]
        entries["row"] -= np.uint64(self.rows.start)  # of a copy
        self._states.update(PartEntries(part, entries))
        while len(entries):  # more than one round only if the chunk has a row twice
            _, first = np.unique(entries["row"], return_index=True)
            self._compete(entries[first])
            entries = np.delete(entries, first)

    def _compete(self, entries: np.ndarray) -> None:
        places = entries["row"].astype(np.int64)
        holders = self.entries[places]
        is_empty = holders["length"] == 0
        is_again = ~is_empty & (holders["attempt"] == entries["attempt"])
        is_same = (holders["crc"] == entries["crc"]) & (holders["length"] == entries["length"])
        self.num_overlaps += int((is_again & is_same).sum())
        self.num_conflicts += int((is_again & ~is_same).sum())
        wins = is_empty | (entries["attempt"] > holders["attempt"])
        wins |= is_again & (entries["generation"] < holders["generation"])
        self.entries[places[wins]] = entries[wins]
        self.part_ids[places[wins]] = len(self.parts) - 1
