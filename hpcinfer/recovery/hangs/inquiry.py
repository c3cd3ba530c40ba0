"""Inquiries: files in which ranks that wait ask who still moves, and all answer. There is nothing while all goes well.

    hangs/<MPI job>/<number>/<rank>.json      an answer
                             <rank>.evidence  what a neighbour saw of a silent rank
                             verdict.json     the end: written once, by one rank

A file may be read before it is there, and late: on a shared file system nobody sees what others write at once.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpcinfer.recovery.durable import publish_bytes, temporary_path, write_new
from hpcinfer.recovery.hangs.autopsy import Answer, Verdict

_VERDICT, _EVIDENCE, _ANSWER = "verdict.json", ".evidence", ".json"


class Inquiries:
    """The inquiries of one MPI job. Holds no state."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def latest(self) -> int:
        """Number of the newest inquiry; 0 if there is none. Not collective."""
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return 0
        return max((int(name) for name in names if name.isdigit()), default=0)

    def open(self, number: int) -> None:
        """Begin an inquiry, unless somebody else has. Not collective."""
        self.folder(number).mkdir(parents=True, exist_ok=True)

    def folder(self, number: int) -> Path:
        """Where an inquiry lies."""
        return self.directory / str(number)

    def answer(self, number: int, answer: Answer) -> None:
        """Write the answer of a rank, or another one in its place. Not collective."""
        self._write(self.folder(number) / f"{answer.rank}{_ANSWER}", answer.to_dict())

    def answers(self, number: int) -> dict[int, Answer]:
        """Read all answers that are there, by rank. Not collective."""
        names = [name for name in os.listdir(self.folder(number)) if name.removesuffix(_ANSWER).isdigit()]
        values = (_read(self.folder(number) / name) for name in names)
        answers = [Answer.from_dict(value) for value in values if value is not None]
        return {answer.rank: answer for answer in sorted(answers, key=lambda answer: answer.rank)}

    def testify(self, number: int, rank: int, evidence: str) -> None:
        """Say what is seen of a silent rank. Not collective."""
        self._write(self.folder(number) / f"{rank}{_EVIDENCE}", evidence)

    def evidence(self, number: int) -> dict[int, str]:
        """Read what was seen of silent ranks. Not collective."""
        found = {path.stem: _read(path) for path in self.folder(number).glob(f"*{_EVIDENCE}")}
        return {int(rank): text for rank, text in found.items() if text is not None}

    def publish(self, number: int, verdict: Verdict) -> bool:
        """End an inquiry; whether it is this verdict that counts. Not collective."""
        return publish_bytes(self.folder(number) / _VERDICT, json.dumps(verdict.to_dict()).encode(), sync=False)

    def verdict(self, number: int) -> Verdict | None:
        """Read the verdict, None if there is none yet. Not collective."""
        values = _read(self.folder(number) / _VERDICT)
        return None if values is None else Verdict.from_dict(values)

    def remove(self, number: int) -> None:
        """Remove an inquiry that has found nothing. Not collective."""
        shutil.rmtree(self.folder(number), ignore_errors=True)

    def close(self) -> None:
        """Remove what is empty. Not collective."""
        with suppress(OSError):
            self.directory.rmdir()
            self.directory.parent.rmdir()

    def _write(self, path: Path, value: Any) -> None:
        temporary = temporary_path(path)
        write_new(temporary, json.dumps(value).encode(), sync=False)
        os.replace(temporary, path)


def _read(path: Path) -> Any | None:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):  # ValueError: seen before all of it is there
        return None
