"""A study on disk: study.json says what was asked, each run has a folder of its own. Starts nothing."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpcinfer.errors import ConfigError, ManifestError
from hpcinfer.recovery.durable import replace_bytes
from hpcinfer.scaling.claim import claim
from hpcinfer.scaling.plan import Point, Rows, Shape, parse_recipe, parse_shape

_FILE = "study.json"


@dataclass(frozen=True)
class Run:
    """One run of a point, and where its files are."""

    point: Point
    repeat: int
    folder: Path

    @property
    def output(self) -> Path:
        """Completions; the job directory is beside it."""
        return self.folder / "output.jsonl"

    @property
    def log(self) -> Path:
        """What launcher and ranks have said."""
        return self.folder / "log"

    @property
    def ending(self) -> Path:
        """How it ended; there since it has."""
        return self.folder / "run.json"

    @property
    def is_done(self) -> bool:
        """Whether it ended well, with a report."""
        values = read_json(self.ending)
        return bool(values) and values["exit_code"] == 0 and self.report is not None

    @property
    def report(self) -> Path | None:
        """What it measured; None if there is nothing."""
        return max(Path(f"{self.output}.job", "reports").glob("*.json"), default=None)

    def claimed(self) -> AbstractContextManager[bool]:
        """Hold the run for this process, as long as the process lives; False if another one does."""
        return claim(self.folder)


@dataclass(frozen=True)
class Study:
    """What is studied."""

    folder: Path
    model: str
    input: str
    flags: tuple[str, ...]  # of `hpcinfer run`, for all runs
    rows: Rows
    repeats: int
    points: tuple[Point, ...]

    def runs(self, only: Shape | None = None) -> list[Run]:
        """All runs, round after round, without those that two points share; of one shape if it is given."""
        points = {point.run_name(): point for point in self.points if not point.problem()}
        wanted = [point for point in points.values() if only in (None, point.shape)]
        return [self.run(point, repeat) for repeat in range(self.repeats) for point in wanted]

    def run(self, point: Point, repeat: int) -> Run:
        """A run of a point."""
        return Run(point, repeat, self.folder / "runs" / point.run_name() / str(repeat))

    def runs_of(self, point: Point) -> list[Run]:
        """The runs of one point."""
        return [self.run(point, repeat) for repeat in range(self.repeats)]

    def grown(self, wanted: Study) -> Study:
        """Add points and repeats to a study that is there.

        Raises:
            ManifestError: another model, input, or options.
        """
        for name in ("model", "input", "flags", "rows"):
            old, new = getattr(self, name), getattr(wanted, name)
            if old != new:
                raise ManifestError(f"{self.folder} is a study with another {name}: {_show(old)}", expected=_show(new),
                                    hint="choose another --output, or the same options")  # fmt: skip
        points = tuple(dict.fromkeys([*self.points, *wanted.points]))
        return replace(self, points=points, repeats=max(self.repeats, wanted.repeats))

    def save(self) -> None:
        """Write study.json, unless it says the same already; appears whole."""
        if load_study(self.folder) == self:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        points = [{"scaling": point.scaling, "shape": str(point.shape), "mesh": str(point.recipe), "rows": point.rows}
                  for point in self.points]  # fmt: skip
        write_json(self.folder / _FILE, {
            "model": self.model, "input": self.input, "flags": self.flags, "rows": self.rows._asdict(),
            "repeats": self.repeats, "points": points,
        })  # fmt: skip


def load_study(folder: Path) -> Study | None:
    """Read a study; None if there is none.

    Raises:
        ConfigError: study.json cannot be understood.
    """
    path = folder / _FILE
    if not path.exists():
        return None
    values = read_json(path)
    try:
        points = tuple(Point(each["scaling"], parse_shape(each["shape"]), parse_recipe(each["mesh"]), each["rows"])
                       for each in values["points"])  # fmt: skip
        return Study(folder, values["model"], values["input"], tuple(values["flags"]), Rows(**values["rows"]),
                     values["repeats"], points)  # fmt: skip
    except (LookupError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: {error}", hint="choose another --output") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read an object; an empty one if there is none."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def write_json(path: Path, values: Any) -> None:
    """Write an object; appears whole."""
    replace_bytes(path, (json.dumps(values, indent=2) + "\n").encode())


def _show(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) and value and isinstance(value[0], str) else str(value)
