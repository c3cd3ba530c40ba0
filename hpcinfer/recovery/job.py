"""A job, opened: manifest compared or written, input found, index built, attempt joined."""

from __future__ import annotations

import codecs
import datetime
import gzip
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpcinfer.agree import on_root
from hpcinfer.config import JobOptions
from hpcinfer.data.rows import input_kind
from hpcinfer.errors import ConfigError
from hpcinfer.recovery.attempts import open_attempt
from hpcinfer.recovery.index import Index, build_index
from hpcinfer.recovery.inputs import InputFile, inspect_input, plain_input
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.manifest import Manifest, open_manifest

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives


@dataclass(frozen=True)
class Job:
    """What every rank knows of the job."""

    paths: JobPaths
    manifest: Manifest
    index: Index
    attempt: int
    input_path: Path  # plain
    kind: str  # "text" or "jsonl"

    @property
    def template_date(self) -> datetime.date:
        """The date that chat templates see."""
        return datetime.date.fromisoformat(self.manifest["template_date"])


def check_job_options(options: JobOptions) -> None:
    """Check what can be checked without touching a file.

    Not collective.

    Raises:
        ConfigError: input or output missing, the same, or of a wrong form.
    """
    for name in ("input", "output"):
        if not getattr(options, name):
            raise ConfigError(f"no --{name}", expected="the path of a file", hint="hpcinfer run --help")
    if Path(options.input).resolve() == Path(options.output).resolve():
        raise ConfigError("--input and --output are the same file", where=options.input)
    if not 0 < options.lease_timeout < math.inf:
        raise ConfigError(f"--lease-timeout {options.lease_timeout}", expected="seconds, more than 0")
    if not options.hang_timeout >= 0:
        raise ConfigError(f"--hang-timeout {options.hang_timeout}", expected="seconds, or 0 for never")
    if not 0 <= options.stop_margin < math.inf:
        raise ConfigError(f"--stop-margin {options.stop_margin}", expected="seconds, 0 or more")
    try:
        datetime.date.fromisoformat(options.template_date or "2000-01-01")
    except ValueError:
        raise ConfigError(f"--template-date {options.template_date}", expected="a date, as 2026-01-31") from None


def find_input(options: JobOptions, group: Collectives) -> InputFile:
    """Find and hash the input, and check that the output may be written.

    Collective over `group`.

    Raises:
        ConfigError: no input, or an output that is there without a job directory.
    """
    paths = JobPaths(Path(options.output))
    on_root(group, lambda: _check_output(paths))
    return inspect_input(Path(options.input), group)


def open_job(options: JobOptions, source: InputFile, values: Manifest, group: Collectives) -> Job:
    """Open the job directory, or make it.

    Collective over `group`.

    Args:
        options: paths and what belongs to this start alone.
        source: the input.
        values: sections of the manifest besides input, seed and template date.

    Raises:
        ManifestError: the directory belongs to another job; every difference is named.
    """
    paths = JobPaths(Path(options.output))
    kind = on_root(group, lambda: _kind(source, options.input_format).encode()).decode()
    sections = {
        **values,
        "input": {"size_bytes": source.size_bytes, "digest": source.digest, "kind": kind},
        "seed": options.seed,
        "template_date": options.template_date,
    }
    manifest = open_manifest(paths, sections, group, {"template_date": datetime.date.today().isoformat()})
    input_path = plain_input(paths, source, group)
    index = build_index(paths, input_path, kind, group)
    attempt = open_attempt(paths, index, group, retry_errors=options.retry_errors)
    return Job(paths, manifest, index, attempt, input_path, kind)


def _kind(source: InputFile, wanted: str) -> str:
    try:
        with gzip.open(source.path) if source.is_gzip else source.path.open("rb") as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise ConfigError("the input is UTF-16", expected="UTF-8", where=str(source.path),
                                  hint="iconv -f UTF-16 -t UTF-8 FILE")  # fmt: skip
            file.seek(0)
            return input_kind(source.path.name, file) if wanted == "auto" else wanted
    except (OSError, EOFError) as error:
        raise ConfigError(f"cannot read the input: {error}", where=str(source.path)) from error


def _check_output(paths: JobPaths) -> bytes:
    paths.require_parent()
    if paths.output.is_dir():
        raise ConfigError(f"--output {paths.output} is a directory", expected="the path of a file")
    if paths.output.exists() and not paths.manifest.exists():
        raise ConfigError(
            f"{paths.output} is there, and no job directory {paths.root} beside it",
            expected="a new file, or the output of a job that can be resumed",
            hint="give another --output, or move the file away",
        )
    return b""
