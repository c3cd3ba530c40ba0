"""Where everything of a job lies: the one place that knows the names inside `<output>.job/`."""

import os
from dataclasses import dataclass
from pathlib import Path

from hpcinfer.errors import ConfigError, JobDirectoryError


@dataclass(frozen=True)
class JobPaths:
    """Paths of one job, all derived from the path of its output."""

    output: Path

    @staticmethod
    def of(path: Path) -> "JobPaths":
        """Paths of the job that an output or a job directory belongs to. Not collective."""
        is_directory = path.name.endswith(".job") and (path / "manifest.json").is_file()
        return JobPaths(path.with_name(path.name.removesuffix(".job")) if is_directory else path)

    @property
    def root(self) -> Path:
        """The job directory, beside the output."""
        return self.output.with_name(self.output.name + ".job")

    @property
    def manifest(self) -> Path:
        """What the job is: model, input, options, seed."""
        return self.root / "manifest.json"

    @property
    def index(self) -> Path:
        """A row per prompt and the block table."""
        return self.root / "index.h5"

    @property
    def plain_input(self) -> Path:
        """The decompressed input, if the input is compressed."""
        return self.root / "input.plain"

    @property
    def claims(self) -> Path:
        """Who took which block."""
        return self.root / "claims"

    @property
    def leases(self) -> Path:
        """Who is alive."""
        return self.root / "leases"

    @property
    def parts(self) -> Path:
        """Finished lines and their sidecars: the journal."""
        return self.root / "parts"

    @property
    def attempts(self) -> Path:
        """A file per time that error rows were put back to work."""
        return self.root / "attempts"

    @property
    def snapshots(self) -> Path:
        """Sequences that were stopped in the middle."""
        return self.root / "snapshots"

    @property
    def claimants(self) -> Path:
        """Who claims for an MPI job whose first claimant has died; made when a job begins that can lose ranks."""
        return self.root / "claimants"

    @property
    def complete(self) -> Path:
        """What the last merge wrote."""
        return self.root / "complete.json"

    @property
    def inflight(self) -> Path:
        """What each replica computes right now; made when a replica begins."""
        return self.root / "inflight"

    @property
    def deaths(self) -> Path:
        """A file per death of a replica; made at the first."""
        return self.root / "deaths"

    @property
    def hangs(self) -> Path:
        """Who waited for whom when a rank hung; made at the first hang."""
        return self.root / "hangs"

    def inflight_rows(self, replica: str) -> Path:
        """Rows in flight of a replica."""
        return self.inflight / f"{replica}.rows"

    def inflight_crash(self, replica: str) -> Path:
        """Why ranks of a replica ended."""
        return self.inflight / f"{replica}.crash"

    def death(self, name: str) -> Path:
        """The record of a death."""
        return self.deaths / f"{name}.json"

    def part_data(self, part: str) -> Path:
        """Lines of a part."""
        return self.parts / f"{part}.jsonl"

    def part_sidecar(self, part: str) -> Path:
        """Entries of a part."""
        return self.parts / f"{part}.sidecar"

    def part_void(self, part: str, name: str) -> Path:
        """Offsets of damaged lines of a part; `name` is new for each finding."""
        return self.parts / f"{part}.{name}.void"

    def create(self) -> None:
        """Make the directories, in the group of the output's directory. Not collective."""
        self.require_parent()
        try:
            if not self.root.is_dir():
                self.root.mkdir(exist_ok=True)
                _follow_group(self.root, self.output.parent)
            for directory in (self.claims, self.leases, self.parts, self.attempts):
                directory.mkdir(exist_ok=True)
        except OSError as error:
            raise JobDirectoryError(f"cannot make the job directory: {error}", where=str(self.root),
                                    hint="is the directory of the output writable?") from error

    def require_parent(self) -> None:
        """Check that the output has a directory to lie in. Not collective."""
        parent = self.output.parent
        if not parent.is_dir():
            raise ConfigError(f"no directory {parent} for the output", expected="a directory that exists",
                              hint=f"mkdir -p {parent}")

    def require(self) -> None:
        """Check that there is a job. Not collective."""
        if not self.manifest.is_file():
            raise ConfigError(f"no job directory for {self.output}", expected=f"{self.manifest}",
                              hint="give the same path as --output of the job")


def _follow_group(directory: Path, parent: Path) -> None:
    """Give `directory`, and all that will be made inside, the group of `parent`, where the system lets us."""
    try:
        os.chown(directory, -1, parent.stat().st_gid)
        os.chmod(directory, directory.stat().st_mode | 0o2000)
    except OSError:
        pass  # not a member of that group: the files keep the user's own group
